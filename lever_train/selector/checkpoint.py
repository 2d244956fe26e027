"""Checkpoints in every format there is: v2 (Lightning), v2format and v3, read safely and strictly.

In goes a ``.pt``, ``.ckpt`` or ``.safetensors`` file; out comes a :class:`Checkpoint` whose tensors
carry the v3 names. Reading runs no code of the file (``lever_data.readers.torch_file``), and
nothing in it is trusted. The kind and shape of the selector are stated or read off its tensors
(``tensors.py``); then every tensor of it must be there with the right shape, tensors of other
modules (``sen_model``) are listed, and anything else is an error. Written are v3, which the legacy
code loads, and v2format.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lever_data.errors import LeverError, UsageError, reason
from lever_data.readers.torch_file import read_torch
from lever_data.store.files import write_atomic
from lever_train.options.train import ModelConfig
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector
from lever_train.selector.tensors import (
    ENTRY,
    ONE_LAYER,
    plainly,
    require_match,
    selector_tensors,
    shape_of,
)

_HYPER_PARAMETERS = {"lr": 1e-4, "weight_decay": 0.001, "warm_steps": 0.05}


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
            "the file is not a checkpoint: it has no model_state_dict (v3) and no state_dict (v2)",
            where=str(path),
            value=sorted(key for key in content if isinstance(key, str)),
        )
    tensors, foreign = selector_tensors(state, path)
    dim, num_features, config = shape_of(tensors, content.get("selector"), path)
    with torch.device("meta"):  # shapes alone
        expected = make_selector(dim, config, num_features)
    require_match(expected, tensors, path)
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
        for old, new in ONE_LAYER.items():
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
    if not path.is_file():
        raise UsageError("there is no such checkpoint", value=str(path))
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("selector")
            entry = {} if said is None else {"selector": json.loads(said)}
            return {"model_state_dict": {n: _array(v) for n, v in load_file(path).items()}} | entry
        except (SafetensorError, OSError, ValueError) as error:
            raise LeverError(
                f"the safetensors file cannot be read ({reason(error)})", where=str(path)
            ) from None
    content = read_torch(path, unknown="placeholder")
    if not isinstance(content, dict):
        raise LeverError("the file is not a checkpoint", where=str(path), value=type(content))
    if content and all(isinstance(value, np.ndarray) for value in content.values()):
        return {"model_state_dict": content}
    return content


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _entry(dim: int, config: ModelConfig, num_features: int) -> dict[str, object]:
    names = ["selector", "hidden", "num_layers", "num_heads", "max_shots"]
    names += ["dropout", "attention_dropout"]
    if config.selector not in ("static", "gru"):  # older levers read these two, and no other entry
        names += ["decoder_gru", "step_embedding", "can_stop"]
    if config.pair_features:
        names.append("pair_features")
    if config.low_rank != ModelConfig().low_rank:
        names.append("low_rank")
    if config.mixture:
        names.append("mixture")
    if config.votes:
        names.append("votes")
    shape = {"dim": dim} | ({"features": num_features} if num_features else {})
    return shape | {ENTRY.get(n, n): getattr(config, n) for n in names}


def _finite(content: Mapping[Any, object], name: str, path: Path) -> int | float | None:
    """An entry that is a finite number of 64 bits; ``None`` where it is not a number at all."""
    value = content.get(name)
    if not isinstance(value, int | float | np.number):
        return None
    if (isinstance(value, int) and not -(2**63) <= value < 2**63) or not np.isfinite(value):
        raise LeverError(
            f"the checkpoint's {name} is not a finite number of 64 bits",
            where=f"{path}: {name}",
            value=plainly(value),
        )
    return value if isinstance(value, int | float) else float(value.real)


def _phase(content: Mapping[Any, object], path: Path) -> str:
    phase = content.get("phase", "sft")
    if not isinstance(phase, str):
        raise LeverError(
            "the checkpoint's phase is not text", where=f"{path}: phase", value=plainly(phase)
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
