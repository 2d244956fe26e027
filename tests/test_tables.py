"""A value that is not allowed, in each of the files lever reads: what, where, which value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lever_data.errors import UsageError
from lever_train.options import resolve
from lever_train.pipeline.config import load_pipeline
from lever_train.sweep.config import load_sweep

HEADS = "num_heads 3 does not divide hidden 256"
LOW = "Input should be greater than or equal to 0"


def _options(path: Path) -> object:
    return resolve(path, {})


@pytest.mark.parametrize(
    ("load", "text", "message"),
    [
        (
            load_pipeline,
            '[data]\ndataset = "d"\n[train.rce]\nepochs = -1',
            f"the config is not allowed: {LOW}; at FILE: train.rce.epochs; value -1",
        ),
        (
            load_pipeline,
            '[data]\ndataset = "d"\n[train.model]\nnum_heads = 3',
            f"the config is not allowed: {HEADS}; at FILE: train.model",
        ),
        (load_pipeline, "", "the config is not allowed: Field required; at FILE: data"),
        (
            load_sweep,
            'name = "s"\ncells = 3',
            "the sweep is not allowed: Input should be a valid tuple; at FILE: cells; value 3",
        ),
        (
            load_sweep,
            'name = "s"\n[grid]\n"rce.epochs" = [1, -1]',
            f"an option of the sweep is not allowed: {LOW}; at FILE: rce.epochs; value -1",
        ),
        (
            load_sweep,
            'name = "s"\n[train.model]\nnum_heads = 3',
            f"an option of the sweep is not allowed: {HEADS}; at FILE: model",
        ),
        (
            _options,
            "[rce]\nepochs = -1",
            f"the option is not allowed: {LOW}; at --rce-epochs ([rce] epochs); value -1",
        ),
        (_options, "[model]\nnum_heads = 3", f"the option is not allowed: {HEADS}; at model"),
    ],
)
def test_a_value_that_is_not_allowed(
    tmp_path: Path, load: Callable[[Path], object], text: str, message: str
) -> None:
    path = tmp_path / "file.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert error.value.message() == message.replace("FILE", str(path))
