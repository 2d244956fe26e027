"""Checkpoints in every format there is: v2 (Lightning), v2format and v3, read safely and strictly.

In goes a ``.pt``, ``.ckpt`` or ``.safetensors`` file; out comes a :class:`Checkpoint` whose tensors
carry the v3 names. Reading runs no code of the file (``lever_data.readers.torch_file``), and
nothing in it is trusted: a file of a few bytes may say anything. The kind and shape of the selector
are stated or read off its tensors; then every tensor of it must be there with the right shape,
tensors of other modules (``sen_model``) are listed, and anything else is an error that names both
sides. Written are v3, which the legacy code loads, and v2format.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.readers.torch_file import read_torch
from lever_data.store.files import write_atomic
from lever_train.options.train import ModelConfig
from lever_train.selector.features import OWN_FEATURES
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector

_LAYER = r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_OWN = re.compile(
    r"(input_proj|query_proj|cand_proj|step_embedding|step_emb|attn_Wc|attn_v|bilinear)\.weight"
    rf"|cross_attn_layers\.[0-9]{{1,9}}\.{_LAYER}"
    r"|attn_norms\.[0-9]{1,9}\.(weight|bias)|(history|decoder_gru)\.(weight|bias)_(ih|hh)"
    r"|(query_update_gate|attn_Wq)\.(weight|bias)|div_lambda|stop_token"
    r"|(past|near|score|low_query|low_cand)\.weight|(pair|end|end_score)\.(weight|bias)"
)
_ONE_LAYER = {"cross_attn.": "cross_attn_layers.0.", "attn_norm.": "attn_norms.0."}
# what wrappers put in front: Lightning, the legacy adapter, DistributedDataParallel, torch.compile
_PREFIX = re.compile(r"((lever_lm|pointer_selector|model|module|_orig_mod)\.)+")
# modules that legacy checkpoints keep beside the selector: the encoders
_FOREIGN = re.compile(r"(sen|sentence|img|image|text|clip|vision)_?\w*\.")
_HYPER_PARAMETERS = {"lr": 1e-4, "weight_decay": 0.001, "warm_steps": 0.05}

_KIND_OF = {  # a tensor's name begins with this: the kind of selector; the first that fits
    "low_query.": "features",
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
_ENTRY = {"selector": "kind", "num_layers": "layers", "num_heads": "heads"}  # option: in the file
_SHOWN_BY = {
    "dim": "input_proj.weight",
    "hidden": "query_proj.weight",
    "layers": "cross_attn_layers",
    "max_shots": "step_embedding.weight",
}
_MAX_DIM = 1 << 20
_PROBLEMS = 10  # named in one error; the others are counted


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    ``layout``: v3 or v2. ``dim``: width d of the embeddings. ``num_features``: of every pair, that
    the selector reads beside them. ``tensors``: the selector's, float32,
    under v3 names. ``foreign``: names of tensors that belong to other modules. ``epoch``,
    ``phase``, ``kl_beta``, ``metrics``: as v3 stores them.
    """

    layout: str
    dim: int
    num_features: int
    config: ModelConfig
    tensors: dict[str, Tensor]
    foreign: tuple[str, ...]
    epoch: int
    phase: str
    kl_beta: float | None
    metrics: dict[str, Any]

    def entry(self) -> dict[str, object]:
        """The kind and shape of the selector, as checkpoints state it."""
        return _entry(self.dim, self.config, self.num_features)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read any checkpoint and check that it is exactly one selector.

    Raises:
        LeverError: not a checkpoint, a tensor of the selector is missing, unknown, doubled, of
            another shape or not finite; a variant that lever does not run; or an entry beside the
            tensors is none of its kind.
    """
    path = Path(path)
    content = _content(path)
    layout = next((k for k in ("model_state_dict", "state_dict") if k in content), None)
    state = content[layout] if layout else None
    if not isinstance(state, Mapping):
        raise LeverError(
            "the file is no checkpoint: neither model_state_dict (v3) nor state_dict (v2) is in it",
            where=str(path),
            value=sorted(key for key in content if isinstance(key, str)),
        )
    tensors, foreign = _selector_tensors(state, path)
    dim, num_features, config = _shape_of(tensors, content.get("selector"), path)
    with torch.device("meta"):  # shapes alone
        expected = make_selector(dim, config, num_features)
    _require_match(expected, tensors, path)
    metrics = content.get("metrics")
    return Checkpoint(
        layout="v3" if layout == "model_state_dict" else "v2",
        dim=dim,
        num_features=num_features,
        config=config,
        tensors=tensors,
        foreign=foreign,
        epoch=int(_finite(content, "epoch", path) or 0),
        phase=_phase(content, path),
        kl_beta=None if (beta := _finite(content, "kl_beta", path)) is None else float(beta),
        metrics=dict(metrics) if isinstance(metrics, Mapping) else {},
    )


def load_selector(path: str | Path, **changes: object) -> tuple[Selector, Checkpoint]:
    """The selector a checkpoint holds, on the CPU in eval mode, and what else the file says.

    ``changes`` replace options that no tensor shows (dropout).
    """
    found = read_checkpoint(path)
    selector = make_selector(found.dim, found.config.model_copy(update=changes), found.num_features)
    selector.load_state_dict(found.tensors, strict=True)
    return selector.eval(), found


@dataclass(frozen=True)
class Progress:
    """What a v3 checkpoint says beside its tensors."""

    epoch: int
    phase: str  # sft | rce | grpo
    kl_beta: float
    metrics: Mapping[str, float]


def save_v3(path: Path, selector: Selector, progress: Progress) -> None:
    """Write a v3 ``.pt``: whole or not at all. The legacy code loads it; the entry ``selector``,
    which it ignores, says the kind and shape."""
    _save(
        path,
        {
            "epoch": progress.epoch,
            "phase": progress.phase,
            "model_state_dict": _plain(selector.state_dict()),
            "kl_beta": progress.kl_beta,
            "metrics": dict(progress.metrics),
            "selector": _entry(selector.dim, selector.config, selector.num_features),
        },
    )


def convert(path: str | Path, out: Path | None = None) -> tuple[Path, Checkpoint]:
    """Write a checkpoint as ``<stem>_v2format.ckpt`` beside it (or as ``out``).

    The loader of the notes looks for ``cross_attn_layers.<l>.*`` and leaves out what it does not
    find, older code for ``cross_attn.*``: one layer is written under both names.

    Raises:
        LeverError: the legacy code has no selector of this kind.
    """
    path = Path(path)
    found = read_checkpoint(path)
    if reason := not_in_v2format(found.config.selector):
        raise LeverError(reason, where=str(path), hint="lever reads the checkpoint as it is")
    out = out or path.with_name(f"{path.stem}_v2format.ckpt")
    tensors = {f"lever_lm.pointer_selector.{n}": v for n, v in _plain(found.tensors).items()}
    if found.config.num_layers == 1:
        for old, new in _ONE_LAYER.items():
            tensors |= {n.replace(new, old): v for n, v in tensors.items() if new in n}
    _save(
        out,
        {
            "epoch": found.epoch,
            "global_step": 0,
            "pytorch-lightning_version": "2.0.0",
            "state_dict": tensors,
            "hyper_parameters": dict(_HYPER_PARAMETERS),
            "selector": found.entry(),
        },
    )
    return out, found


def not_in_v2format(kind: str) -> str | None:
    """Why v2format cannot hold a kind of selector; ``None``: it can."""
    if kind not in ("gru", "features"):
        return None
    return f"v2format cannot hold a {kind} selector: no legacy code has it"


def legacy_caveat(config: ModelConfig) -> str:
    """What the legacy code makes of a v2format file, in one sentence."""
    if config.selector == "static":
        return (
            "the newest legacy code (from 2025-12-29) adds a gate that this file does not hold "
            "and runs it untrained; the code of the notes runs it as trained"
        )
    return (
        f"only the newest legacy code has the {config.selector} selector: the code of the notes "
        "drops what it remembers without a word"
    )


def _content(path: Path) -> Mapping[Any, object]:
    """What the file holds; tensors alone stand as a v3 file without further entries."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("selector")
            entry = {} if said is None else {"selector": json.loads(said)}
            return {"model_state_dict": {n: _array(v) for n, v in load_file(path).items()}} | entry
        except (SafetensorError, OSError, ValueError) as error:
            raise LeverError(
                f"the safetensors file cannot be read ({error})", where=str(path)
            ) from None
    content = read_torch(path, unknown="placeholder")
    if not isinstance(content, dict):
        raise LeverError("the file is not a checkpoint", where=str(path), value=type(content))
    if content and all(isinstance(value, np.ndarray) for value in content.values()):
        return {"model_state_dict": content}
    return content


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _selector_tensors(
    state: Mapping[Any, object], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The selector's tensors under v3 names, and the names of the foreign ones."""
    tensors: dict[str, Tensor] = {}
    foreign: list[str] = []
    unknown: list[str] = []
    for key, value in state.items():
        if not isinstance(key, str):
            raise LeverError(
                "a tensor of the checkpoint has no name", where=str(path), value=_plainly(key)
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
    for old, new in _ONE_LAYER.items():
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


def _shape_of(
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
            value=None if isinstance(value, Mapping) else _plainly(value),
        )

    dim = shape.pop("dim", None)
    if not isinstance(dim, int) or not 1 <= dim <= _MAX_DIM:
        raise refusal("dim", f"d is at least 1 and less than or equal to {_MAX_DIM:,}", dim)
    features = shape.pop("features", 0)
    if not isinstance(features, int) or not 0 <= features <= _MAX_DIM:
        raise refusal("features", f"at least 0 and less than or equal to {_MAX_DIM:,}", features)
    option_of = {entry: option for option, entry in _ENTRY.items()}
    try:
        config = ModelConfig.model_validate({option_of.get(k, k): v for k, v in shape.items()})
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(_plainly(_ENTRY.get(str(key), key))) for key in first["loc"])
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
        if "low_query.weight" in tensors:
            shape["dim"] = _rows_and_columns(tensors, "low_query.weight", path)[1]
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


def _require_match(selector: Selector, tensors: Mapping[str, Tensor], path: Path) -> None:
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


def _plainly(value: object) -> object:
    """A value as an error shows it: what may be of any size, by its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    return value if isinstance(value, str | int | float) else type(value).__name__


def _entry(dim: int, config: ModelConfig, num_features: int) -> dict[str, object]:
    names = ["selector", "hidden", "num_layers", "num_heads", "max_shots"]
    names += ["dropout", "attention_dropout"]
    if config.selector not in ("static", "gru"):  # older levers read these two, and no other entry
        names += ["decoder_gru", "step_embedding", "can_stop"]
    shape = {"dim": dim} | ({"features": num_features} if num_features else {})
    return shape | {_ENTRY.get(n, n): getattr(config, n) for n in names}


def _finite(content: Mapping[Any, object], name: str, path: Path) -> int | float | None:
    """An entry that is a finite number of 64 bits; ``None`` where it is no number at all."""
    value = content.get(name)
    if not isinstance(value, int | float | np.number):
        return None
    if (isinstance(value, int) and not -(2**63) <= value < 2**63) or not np.isfinite(value):
        raise LeverError(
            f"the checkpoint's {name} is no finite number of 64 bits",
            where=f"{path}: {name}",
            value=_plainly(value),
        )
    return value if isinstance(value, int | float) else float(value.real)


def _phase(content: Mapping[Any, object], path: Path) -> str:
    phase = content.get("phase", "sft")
    if not isinstance(phase, str):
        raise LeverError(
            "the checkpoint's phase is no text", where=f"{path}: phase", value=_plainly(phase)
        )
    return phase


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _save(path: Path, content: Mapping[str, object]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise LeverError(
            f"the checkpoint cannot be written ({error.strerror})", where=str(path)
        ) from error
