"""The shape of the selector in a checkpoint: stated, or read off its tensors, and then required.

In go tensors under v3 names and what the file says of the shape; out comes a
:class:`SelectorConfig`, or an error that names the file and the entry. Nothing is trusted: a file
of a few bytes may say anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from lever_data.errors import LeverError
from lever_train.selector.history import make_selector
from lever_train.selector.model import SelectorConfig

_PROBLEMS = 10  # named in one error; the others are counted
_SHOWN_BY = {
    "dim": "input_proj.weight",
    "hidden": "query_proj.weight",
    "layers": "cross_attn_layers",
    "max_shots": "step_embedding.weight",
}


def shape_of(tensors: Mapping[str, Tensor], stated: object, path: Path) -> SelectorConfig:
    """The selector's shape, stated or read off its tensors.

    It has no more layers than the file has tensors, so that building one to compare with takes no
    longer than reading the file.

    Raises:
        LeverError: no selector has this shape; the error names the entry or the tensor.
    """
    shape = dict(stated) if isinstance(stated, Mapping) else _shape(tensors, path)
    try:
        config = SelectorConfig.model_validate(shape)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(str(plainly(key)) for key in first["loc"])
        entry = f"selector.{entry}" if isinstance(stated, Mapping) else _SHOWN_BY.get(entry, entry)
        raise LeverError(
            f"the checkpoint says a shape no selector has ({first['msg']})",
            where=f"{path}: {entry}",
            value=None if isinstance(first["input"], Mapping) else plainly(first["input"]),
        ) from None
    if isinstance(stated, Mapping):
        _require_tensors(config.layers, tensors, f"{path}: selector.layers")
    return config


def _shape(tensors: Mapping[str, Tensor], path: Path) -> dict[str, object]:
    """What the tensors of a legacy file show of the shape."""
    if "query_proj.weight" not in tensors:
        raise LeverError(
            "the checkpoint holds no selector",
            where=str(path),
            value=", ".join(sorted(tensors)) or "no tensor with a selector's name",
        )
    hidden, _ = _rows_and_columns(tensors, "query_proj.weight", path)
    shape: dict[str, object] = {"hidden": hidden, "dim": hidden}
    if "input_proj.weight" in tensors:
        shape["dim"] = _rows_and_columns(tensors, "input_proj.weight", path)[1]
    if "step_embedding.weight" in tensors:
        steps, _ = _rows_and_columns(tensors, "step_embedding.weight", path)
        shape |= {"kind": "gru", "max_shots": steps}
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
            "a tensor of the selector is no matrix", where=f"{path}: {name}", value=list(shape)
        )
    return shape[0], shape[1]


def require_match(config: SelectorConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not exactly those of a selector of this shape.

    Raises:
        LeverError: it names what is missing, too much or of another shape, with both sides.
    """
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
        left = len(problems) - _PROBLEMS
        more = f"; and {left:,} more" if left > 0 else ""
        raise LeverError(
            f"the checkpoint is not a {config.kind} selector of {config.layers} layers, "
            f"{config.dim} → {config.hidden}: {'; '.join(problems[:_PROBLEMS])}{more}",
            where=str(path),
        )


def plainly(value: object) -> object:
    """A value as an error shows it: what may be of any size, by its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    return value if isinstance(value, str | int | float) else type(value).__name__
