"""What the tensors of a checkpoint show: which are the selector's, and its kind and shape.

In go the tensors of a file under any of the names there are, and what the file states of their
selector; out come those of the selector under v3 names, and its options. Nothing is trusted: a file
of a few bytes may say anything. What does not fit is an error that names both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from lever_data.errors import LeverError
from lever_train.options.train import ModelConfig
from lever_train.selector.features import OWN_FEATURES
from lever_train.selector.model import Selector

_LAYER = r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_OWN = re.compile(
    r"(input_proj|query_proj|cand_proj|step_embedding|step_emb|attn_Wc|attn_v|bilinear)\.weight"
    rf"|cross_attn_layers\.[0-9]{{1,9}}\.{_LAYER}"
    r"|attn_norms\.[0-9]{1,9}\.(weight|bias)|(history|decoder_gru)\.(weight|bias)_(ih|hh)"
    r"|(query_update_gate|attn_Wq)\.(weight|bias)|div_lambda|stop_token"
    r"|(past|near|score|own|low_query|low_cand|turn_near)\.weight|(pair|end|end_score|turn)\.(weight|bias)"
    r"|feature_(mean|std)"
)
ONE_LAYER = {"cross_attn.": "cross_attn_layers.0.", "attn_norm.": "attn_norms.0."}
# what wrappers put in front: Lightning, the legacy adapter, DistributedDataParallel, torch.compile
_PREFIX = re.compile(r"((lever_lm|pointer_selector|model|module|_orig_mod)\.)+")
# modules that legacy checkpoints keep beside the selector: the encoders
_FOREIGN = re.compile(r"(sen|sentence|img|image|text|clip|vision)_?\w*\.")
_KIND_OF = {  # a tensor's name begins with this: the kind of selector; the first that fits
    "low_query.": "features",
    "pair.": "features",
    "query_update_gate.": "gated",
    "history.": "gru",
    "step_embedding.": "gru",
    "div_lambda": "mmr",
    "attn_W": "additive",
    "attn_v.": "additive",
    "bilinear.": "bilinear",
    "stop_token": "stop",
    "decoder_gru.": "decoder",
    "step_emb.": "decoder",
}
_NOT_HELD = {  # likewise, of the legacy variants that lever does not run
    "cand_encoder": "V4-4 (encoder of the candidate set)",
    "topic_": "V4-6 (coverage of topics)",
    "query_topic_": "V4-6 (coverage of topics)",
    "cover_lambda": "V4-6 (coverage of topics)",
    "dpp_": "V4-7 (determinantal point process)",
    "slot_": "V4-8 (slots)",
    "refine_": "V4-9 (two stages)",
    "query_update_weight": "V1 (one weight in place of the gate)",
}
ENTRY = {"selector": "kind", "num_layers": "layers", "num_heads": "heads"}  # option: in the file
_SHOWN_BY = {
    "dim": "input_proj.weight",
    "hidden": "query_proj.weight",
    "layers": "cross_attn_layers",
    "max_shots": "step_embedding.weight",
}
_MAX_DIM = 1 << 20
_PROBLEMS = 10  # named in one error; the others are counted


def selector_tensors(
    state: Mapping[Any, object], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The selector's tensors under v3 names, and the names of the foreign ones."""
    tensors: dict[str, Tensor] = {}
    foreign: list[str] = []
    unknown: list[str] = []
    for key, value in state.items():
        if not isinstance(key, str):
            raise LeverError(
                "a tensor of the checkpoint has no name", where=str(path), value=plainly(key)
            )
        name = _v3_name(key)
        if variant := next((v for n, v in _NOT_HELD.items() if name.startswith(n)), None):
            raise LeverError(
                f"the checkpoint is a legacy selector that lever does not run: {variant}",
                where=f"{path}: {key}",
                hint="lever runs static, gated, decoder, mmr, additive, bilinear and stop",
            )
        if not _OWN.fullmatch(name):
            (foreign if _FOREIGN.match(name) else unknown).append(key)
            continue
        tensor = _as_tensor(value, key, path)
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise LeverError(
                "two tensors have one place in the selector", where=str(path), value=key
            )
        tensors[name] = tensor
    if unknown:
        raise LeverError(
            "the checkpoint holds tensors that the selector has no place for",
            where=str(path),
            value=", ".join(unknown),
            hint=f"the selector found beside them: {', '.join(sorted(tensors)) or 'nothing'}",
        )
    return tensors, tuple(foreign)


def _v3_name(key: str) -> str:
    name = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
    for old, new in ONE_LAYER.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _as_tensor(value: object, key: str, path: Path) -> Tensor:
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise LeverError(
            "a tensor of the selector is not of floats", where=f"{path}: {key}", value=kind
        )
    with np.errstate(over="ignore"):  # seen below
        cast = np.array(value, dtype=np.float32)
    if not np.isfinite(cast).all():
        what = "numbers too large for float32" if np.isfinite(value).all() else "NaN or infinity"
        raise LeverError(f"a tensor of the selector holds {what}", where=f"{path}: {key}")
    return torch.from_numpy(cast)


def shape_of(
    tensors: Mapping[str, Tensor], stated: object, path: Path
) -> tuple[int, int, ModelConfig]:
    """The selector's d, its number of features and its options, stated or read off its tensors.

    It has no more layers than the file has tensors, so that building one to compare with takes no
    longer than reading the file.

    Raises:
        LeverError: no selector has this shape; the error names the entry or the tensor.
    """
    shape = dict(stated) if isinstance(stated, Mapping) else _shown_shape(tensors, path)

    def refusal(entry: str, problem: str, value: object) -> LeverError:
        shown = _SHOWN_BY.get(entry, entry)
        if isinstance(stated, Mapping):
            shown = f"selector.{entry}" if entry else "selector"
        return LeverError(
            f"the checkpoint says a shape no selector has ({problem})",
            where=f"{path}: {shown}",
            value=None if isinstance(value, Mapping) else plainly(value),
        )

    dim = shape.pop("dim", None)
    if not isinstance(dim, int) or not 1 <= dim <= _MAX_DIM:
        raise refusal("dim", f"d is at least 1 and less than or equal to {_MAX_DIM:,}", dim)
    features = shape.pop("features", 0)
    if not isinstance(features, int) or not 0 <= features <= _MAX_DIM:
        raise refusal("features", f"at least 0 and less than or equal to {_MAX_DIM:,}", features)
    option_of = {entry: option for option, entry in ENTRY.items()}
    try:
        config = ModelConfig.model_validate({option_of.get(k, k): v for k, v in shape.items()})
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(plainly(ENTRY.get(str(key), key))) for key in first["loc"])
        raise refusal(at, first["msg"], first["input"]) from None
    if isinstance(stated, Mapping):
        _require_tensors(config.num_layers, tensors, f"{path}: selector.layers")
    return dim, features, config


def _shown_shape(tensors: Mapping[str, Tensor], path: Path) -> dict[Any, object]:
    """What the tensors of a legacy file show of the shape, under the names of the entry."""
    widths = ("query_proj.weight", "cand_proj.weight", "input_proj.weight", "pair.weight")
    known = next((name for name in widths if name in tensors), None)
    if known is None:
        raise LeverError(
            "the checkpoint holds no selector",
            where=str(path),
            value=", ".join(sorted(tensors)) or "no tensor with a selector's name",
        )
    hidden, read = _rows_and_columns(tensors, known, path)
    shape: dict[Any, object] = {"hidden": hidden, "dim": hidden}
    if known == "pair.weight":
        shape |= {"features": read - OWN_FEATURES, "can_stop": "end.weight" in tensors}
        shape["votes"] = "own.weight" in tensors
        shape["mixture"] = "turn.weight" in tensors
        shape["low_rank"] = 0
        if "low_query.weight" in tensors:
            rank, width = _rows_and_columns(tensors, "low_query.weight", path)
            shape |= {"low_rank": rank, "dim": width}
    if "input_proj.weight" in tensors:
        shape["dim"] = _rows_and_columns(tensors, "input_proj.weight", path)[1]
    for start, kind in _KIND_OF.items():
        if any(name.startswith(start) for name in tensors):
            shape["kind"] = kind
            shape["decoder_gru"] = any(name.startswith("decoder_gru.") for name in tensors)
            shape["step_embedding"] = "step_emb.weight" in tensors
            break
    for name in ("step_embedding.weight", "step_emb.weight"):
        if name in tensors:
            shape["max_shots"] = _rows_and_columns(tensors, name, path)[0]
    layers = 0
    for name in tensors:
        if name.startswith("cross_attn_layers."):
            layers = max(layers, int(name.split(".")[1]) + 1)
            _require_tensors(layers, tensors, f"{path}: {name}")
    return shape | {"layers": layers}


def _require_tensors(layers: int, tensors: Mapping[str, Tensor], where: str) -> None:
    if layers > len(tensors):
        raise LeverError(
            "the checkpoint says more layers than it has tensors",
            where=where,
            value=f"{layers:,} layers, {len(tensors):,} tensors",
        )


def _rows_and_columns(tensors: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise LeverError(
            "a tensor of the selector is not a matrix", where=f"{path}: {name}", value=list(shape)
        )
    return shape[0], shape[1]


def require_match(selector: Selector, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not exactly those of the selector.

    Raises:
        LeverError: it names what is missing, too much or of another shape, with both sides.
    """
    config = selector.config
    expected = {name: tuple(t.shape) for name, t in selector.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = [
        f"the selector needs {n} {list(expected[n])}, the file lacks it"
        for n in expected
        if n not in found
    ]
    problems += [
        f"the file has {n} {list(found[n])}, the selector does not"
        for n in found
        if n not in expected
    ]
    problems += [
        f"{n}: the file has {list(found[n])}, the selector needs {list(expected[n])}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    if problems:
        left = len(problems) - _PROBLEMS
        more = f"; and {left:,} more" if left > 0 else ""
        raise LeverError(
            f"the checkpoint is not a {config.selector} selector of {config.num_layers} layers, "
            f"{selector.dim} → {config.hidden}: {'; '.join(problems[:_PROBLEMS])}{more}",
            where=str(path),
        )


def plainly(value: object) -> object:
    """A value as an error shows it: what may be of any size, by its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    return value if isinstance(value, str | int | float) else type(value).__name__
