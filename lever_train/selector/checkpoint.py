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
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.readers.torch_file import read_torch
from lever_data.store.store import write_atomic
from lever_train.selector.checkpoint_shape import plainly, require_match, shape_of
from lever_train.selector.history import make_selector
from lever_train.selector.model import Selector, SelectorConfig

_LAYER = r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_OWN = re.compile(
    r"(input_proj|query_proj|cand_proj|step_embedding)\.weight"
    rf"|cross_attn_layers\.[0-9]{{1,9}}\.{_LAYER}"
    r"|attn_norms\.[0-9]{1,9}\.(weight|bias)|history\.(weight|bias)_(ih|hh)"
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
            another shape or not finite; or an entry beside them is none of its kind.
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
            value=sorted(key for key in content if isinstance(key, str)),
        )
    tensors, foreign = _selector_tensors(content[layout], path)
    config = shape_of(tensors, content.get("selector"), path)
    require_match(config, tensors, path)
    metrics = content.get("metrics")
    return Checkpoint(
        layout="v3" if layout == "model_state_dict" else "v2",
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
        if not isinstance(key, str):
            raise LeverError(
                "a tensor of the checkpoint has no name", where=str(path), value=plainly(key)
            )
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
    with np.errstate(over="ignore"):  # seen below
        cast = np.array(value, dtype=np.float32)
    if not np.isfinite(cast).all():
        what = "numbers too large for float32" if np.isfinite(value).all() else "NaN or infinity"
        raise LeverError(f"a tensor of the selector holds {what}", where=f"{path}: {key}")
    return torch.from_numpy(cast)


def _finite(content: Mapping[Any, object], name: str, path: Path) -> int | float | None:
    """An entry that is a finite number of 64 bits; ``None`` where it is no number at all."""
    value = content.get(name)
    if not isinstance(value, int | float | np.number):
        return None
    if (isinstance(value, int) and not -(2**63) <= value < 2**63) or not np.isfinite(value):
        raise LeverError(
            f"the checkpoint's {name} is no finite number of 64 bits",
            where=f"{path}: {name}",
            value=plainly(value),
        )
    return value if isinstance(value, int | float) else float(value.real)


def _phase(content: Mapping[Any, object], path: Path) -> str:
    phase = content.get("phase", "sft")
    if not isinstance(phase, str):
        raise LeverError(
            "the checkpoint's phase is no text", where=f"{path}: phase", value=plainly(phase)
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
