"""Checkpoints in every format there is: v2 (Lightning), v2format and v3, read safely and strictly.

In goes a ``.pt`` or ``.ckpt`` file; out comes a :class:`Checkpoint` whose tensors carry the v3
names. Reading runs no code of the file (``lever_data.readers.torch_file``). Every tensor of the
selector must be there with the right shape; tensors of other modules (``sen_model``) are listed;
anything else is an error that names both sides. Written are v3, which the legacy code loads, and
v2format.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.readers.torch_file import read_torch
from lever_data.store import write_atomic
from lever_train.history import make_selector
from lever_train.selector import Selector, SelectorConfig

_LAYER = r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_OWN = re.compile(
    rf"(input_proj|query_proj|cand_proj|step_embedding)\.weight|cross_attn_layers\.\d+\.{_LAYER}"
    r"|attn_norms\.\d+\.(weight|bias)|history\.(weight|bias)_(ih|hh)"
)
_ONE_LAYER = {"cross_attn.": "cross_attn_layers.0.", "attn_norm.": "attn_norms.0."}
_PREFIXES = ("lever_lm.pointer_selector.", "lever_lm.")
# modules that legacy checkpoints keep beside the selector: the encoders
_FOREIGN = re.compile(r"(sen|sentence|img|image|text|clip|vision)_?\w*\.")
_HYPER_PARAMETERS = {"lr": 1e-4, "weight_decay": 0.001, "warm_steps": 0.05}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    ``tensors``: the selector's, float32, under v3 names. ``foreign``: names of tensors that belong
    to other modules. ``epoch``, ``phase``, ``kl_beta``, ``metrics``: as v3 stores them.
    """

    layout: str  # "v3" | "v2"
    config: SelectorConfig
    tensors: dict[str, Tensor]
    foreign: tuple[str, ...]
    epoch: int
    phase: str
    kl_beta: float | None
    metrics: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read any checkpoint and check that it is exactly one selector.

    Raises:
        LeverError: not a checkpoint, a tensor of the selector is missing, unknown, doubled, of
            another shape or not finite.
    """
    path = Path(path)
    content = read_torch(path, unknown="placeholder")
    if not isinstance(content, dict):
        raise LeverError("the file is not a checkpoint", where=str(path), value=type(content))
    layout = next((k for k in ("model_state_dict", "state_dict") if k in content), None)
    if layout is None or not isinstance(content[layout], Mapping):
        raise LeverError(
            "the file is no checkpoint: neither model_state_dict (v3) nor state_dict (v2) is in it",
            where=str(path),
            value=sorted(map(str, content)),
        )
    tensors, foreign = _selector_tensors(content[layout], path)
    config = _config(tensors, content.get("selector"), path)
    _require_match(config, tensors, path)
    metrics = content.get("metrics")
    return Checkpoint(
        layout="v3" if layout == "model_state_dict" else "v2",
        config=config,
        tensors=tensors,
        foreign=foreign,
        epoch=_number(content.get("epoch"), 0),
        phase=str(content.get("phase", "sft")),
        kl_beta=float(beta) if isinstance(beta := content.get("kl_beta"), int | float) else None,
        metrics=dict(metrics) if isinstance(metrics, Mapping) else {},
    )


def load_selector(path: str | Path, **changes: object) -> tuple[Selector, Checkpoint]:
    """The selector a checkpoint holds, on the CPU in eval mode, and what else the file says.

    ``changes`` replace fields of its config that no tensor shows (dropout, heads).
    """
    found = read_checkpoint(path)
    config = found.config.model_copy(update=changes)
    selector = make_selector(config)
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
            "selector": selector.config.model_dump(),
        },
    )


def convert(path: str | Path, out: Path | None = None) -> tuple[Path, Checkpoint]:
    """Write a checkpoint as ``<stem>_v2format.ckpt`` beside it (or as ``out``).

    One layer takes the old names ``cross_attn.*`` and ``attn_norm.*``; more keep all their layers.
    """
    path = Path(path)
    found = read_checkpoint(path)
    out = out or path.with_name(f"{path.stem}_v2format.ckpt")
    tensors = {
        _PREFIXES[0] + _v2_name(name, found.config.layers): value
        for name, value in found.tensors.items()
    }
    _save(
        out,
        {
            "epoch": found.epoch,
            "global_step": 0,
            "pytorch-lightning_version": "2.0.0",
            "state_dict": _plain(tensors),
            "hyper_parameters": dict(_HYPER_PARAMETERS),
            "selector": found.config.model_dump(),
        },
    )
    return out, found


def _selector_tensors(
    state: Mapping[str, object], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The selector's tensors under v3 names, and the names of the foreign ones."""
    tensors: dict[str, Tensor] = {}
    foreign: list[str] = []
    unknown: list[str] = []
    for key, value in state.items():
        name = _v3_name(key)
        if not _OWN.fullmatch(name):
            (foreign if _FOREIGN.match(name) else unknown).append(key)
        elif name in tensors:
            raise LeverError(
                "two tensors have one place in the selector", where=str(path), value=key
            )
        else:
            tensors[name] = _as_tensor(value, key, path)
    if unknown:
        raise LeverError(
            "the checkpoint holds tensors that the selector has no place for",
            where=str(path),
            value=", ".join(unknown),
            hint=f"the selector found beside them: {', '.join(sorted(tensors)) or 'nothing'}",
        )
    return tensors, tuple(foreign)


def _v3_name(key: str) -> str:
    name = key
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    for old, new in _ONE_LAYER.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _v2_name(name: str, layers: int) -> str:
    if layers == 1:
        for old, new in _ONE_LAYER.items():
            if name.startswith(new):
                return old + name.removeprefix(new)
    return name


def _as_tensor(value: object, key: str, path: Path) -> Tensor:
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise LeverError(
            "a tensor of the selector is not of floats", where=f"{path}: {key}", value=kind
        )
    if not np.isfinite(value).all():
        raise LeverError("a tensor of the selector holds NaN or infinity", where=f"{path}: {key}")
    return torch.from_numpy(np.array(value, dtype=np.float32))


def _config(tensors: Mapping[str, Tensor], stated: object, path: Path) -> SelectorConfig:
    """The selector's shape, read off its tensors; what they do not show is stated or default."""
    if isinstance(stated, Mapping):
        try:
            return SelectorConfig.model_validate(dict(stated))
        except ValidationError as error:
            raise LeverError(
                f"the checkpoint says a shape no selector has ({error.errors()[0]['msg']})",
                where=str(path),
                value=dict(stated),
            ) from None
    if "query_proj.weight" not in tensors:
        raise LeverError(
            "the checkpoint holds no selector",
            where=str(path),
            value=", ".join(sorted(tensors)) or "no tensor with a selector's name",
        )
    hidden = tensors["query_proj.weight"].shape[0]
    inward = tensors.get("input_proj.weight")
    layers = [int(n.split(".")[1]) for n in tensors if n.startswith("cross_attn_layers.")]
    steps = tensors.get("step_embedding.weight")
    return SelectorConfig(
        kind="static" if steps is None else "gru",
        dim=hidden if inward is None else inward.shape[-1],
        hidden=hidden,
        layers=max(layers, default=-1) + 1,
        max_shots=4 if steps is None else steps.shape[0],
    )


def _require_match(config: SelectorConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in make_selector(config).state_dict().items()}
    found = {n: tuple(t.shape) for n, t in tensors.items()}
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
        raise LeverError(
            f"the checkpoint is not a {config.kind} selector of {config.layers} layers, "
            f"{config.dim} → {config.hidden}: {'; '.join(problems)}",
            where=str(path),
        )


def _number(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float | np.number) else default


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
