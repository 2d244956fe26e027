"""Each of the TOML files lever reads: what is not allowed in it, where, which value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lever_data.errors import UsageError
from lever_data.toml import read_toml
from lever_train.options.pipeline import load_pipeline
from lever_train.options.resolve import resolve
from lever_train.options.sweep import load_sweep

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
            "the sweep is not allowed: a list is meant; at FILE: cells; value 3",
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


@pytest.mark.parametrize(
    ("load", "text", "message", "hint"),
    [
        (load_pipeline, "[dta]", "config; at FILE; value 'dta'", "data"),
        (load_pipeline, "[train.rec]", "config; at FILE: [train]; value 'rec'", "rce"),
        (load_pipeline, "[train.rce]\nl=1", "config; at FILE: [train]: [rce]; value 'l'", "lr"),
        (load_sweep, "[gird]", "sweep; at FILE; value 'gird'", "grid"),
        (
            load_sweep,
            'name = "s"\n[train.rec]',
            "sweep; at FILE: [train]; value 'rec'",
            "rce",
        ),
        (
            load_sweep,
            'name = "s"\n[grid]\n"train.rce.lr" = [1]',
            "sweep; at FILE: [grid]; value 'train.rce.lr'",
            "rce.lr",
        ),
        (
            load_sweep,
            'name = "s"\n[[cells]]\n"rce.lr" = 1\n[[cells]]\nbatch_size = 2',
            "sweep; at FILE: [[cells]]; value 'batch_size'",
            "run.batch_size",
        ),
        (_options, "[gpro]", "config; at FILE; value 'gpro'", "grpo"),
        (_options, "[rce]\nepoch = 7", "config; at FILE: [rce]; value 'epoch'", "epochs"),
    ],
)
def test_an_unknown_key_and_the_nearest_one(
    tmp_path: Path, load: Callable[[Path], object], text: str, message: str, hint: str
) -> None:
    path = tmp_path / "file.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert error.value.message() == f"unknown key in the {message}".replace("FILE", str(path))
    assert error.value.hint == f"did you mean {hint}?"


def test_a_key_that_is_near_none(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text("[xyzzy]")
    with pytest.raises(UsageError) as error:
        load_sweep(path)
    assert error.value.hint == "known are: name, base, out, judged_on, eval, train, grid, cells"


@pytest.mark.parametrize(
    ("load", "what"),
    [(load_pipeline, "the config"), (load_sweep, "the sweep"), (_options, "the config")],
)
def test_a_file_that_is_not_toml(tmp_path: Path, load: Callable[[Path], object], what: str) -> None:
    path = tmp_path / "file.toml"
    with pytest.raises(UsageError) as error:
        load(path)
    missing = f"{what} cannot be read (No such file or directory); at {path}"
    assert error.value.message() == missing
    for content in (b"[data", b'name = "\xff"'):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"^{what} is not TOML .*; at {path}$"):
            load(path)


def test_a_toml_file_as_tables(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text('[train.rce]\nlr = 1e-3\n[data]\ndataset = "d"')
    assert read_toml(path, "the file") == {"train": {"rce": {"lr": 1e-3}}, "data": {"dataset": "d"}}
