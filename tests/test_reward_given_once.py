"""A reward is given once: as a mode or as an expression, in every command that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import UsageError
from lever_data.relations.reward_spec import RewardSpec
from lever_train.options.pipeline import load_pipeline
from lever_train.options.resolve import resolve, to_toml
from lever_train.options.sweep import cell_config, load_sweep
from lever_train.options.train import TrainConfig
from tests.commands import lever

FLAGS = {"mode": "soft_only", "expression": "correct"}
TABLE = 'mode = "soft_only"\nexpression = "correct"\n'
REFUSED = (
    "--reward-mode (mode = 'soft_only') and --reward (expression = 'correct') "
    "exclude each other: give one of the two"
)


def _reward(config: TrainConfig) -> tuple[str, str | None]:
    return config.reward.mode, config.reward.expression


def _write(folder: Path, text: str) -> Path:
    path = folder / "file.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", ["train", "audit"])
def test_both_flags_are_refused(tmp_path: Path, command: str) -> None:
    words = ["--reward-mode", "soft_only", "--reward", "correct"]
    out = ["--out", tmp_path / "out"] if command == "train" else []
    done = lever(command, "--store", tmp_path / "none", *words, *out, check=False)
    assert done.returncode == 2 and REFUSED in done.stderr


def test_the_mode_that_is_the_default_is_a_mode_given() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        resolve(None, {"reward.mode": RewardSpec().mode, "reward.expression": "1"})


@pytest.mark.parametrize(
    ("load", "text", "refused"),
    [
        (
            lambda path: resolve(path, {}),
            f"[reward]\n{TABLE}",
            "the option is not allowed: {why}; at reward",
        ),
        (
            load_pipeline,
            f'[data]\ndataset = "d"\n[train.reward]\n{TABLE}',
            "the config is not allowed: {why}; at {path}: train.reward",
        ),
        (
            load_sweep,
            f'name = "s"\n[train.reward]\n{TABLE}',
            "an option of the sweep is not allowed: {why}; at {path}: reward",
        ),
        (
            load_sweep,
            'name = "s"\n[[cells]]\n"reward.mode" = "soft_only"\n'
            '[grid]\n"reward.expression" = ["correct"]',
            "an option of the sweep is not allowed: {why}; at {path}: reward",
        ),
    ],
)
def test_both_in_a_file_are_refused(
    tmp_path: Path, load: Callable[[Path], object], text: str, refused: str
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert error.value.message() == refused.format(why=REFUSED, path=path)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"reward.mode": "separated"}, ("separated", None)),
        ({"reward.expression": "1"}, (RewardSpec().mode, "1")),
    ],
)
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_replaces_what_the_file_says(
    tmp_path: Path, name: str, flags: dict[str, Any], found: tuple[str, str | None]
) -> None:
    path = _write(tmp_path, f'[reward]\n{name} = "{FLAGS[name]}"\nhard_weight = 2.0\n')
    config = resolve(path, flags)
    assert _reward(config) == found and config.reward.hard_weight == 2.0


def test_a_config_with_an_expression_is_read_back(tmp_path: Path) -> None:
    config = resolve(None, {"reward.expression": "correct"})
    again = resolve(_write(tmp_path, to_toml(config)), {})
    assert again == config
    assert _reward(resolve(tmp_path / "file.toml", {"reward.mode": "separated"})) == (
        "separated",
        None,
    )


@pytest.mark.parametrize(
    ("shared", "found"),
    [
        ("", ("soft_only", None)),
        ('[train.reward]\nexpression = "1"\n', (RewardSpec().mode, "1")),
        ('[grid]\n"reward.expression" = ["2"]\n', (RewardSpec().mode, "2")),
        (
            '[train.reward]\nexpression = "1"\n[grid]\n"reward.mode" = ["separated"]\n',
            ("separated", None),
        ),
    ],
)
def test_a_cell_replaces_what_the_sweep_says_and_that_what_the_base_says(
    tmp_path: Path, shared: str, found: tuple[str, str | None]
) -> None:
    sweep = load_sweep(_write(tmp_path, f'name = "s"\n{shared}'))
    base = TrainConfig(reward=RewardSpec(mode="soft_only", hard_weight=2.0))
    config = cell_config(base, sweep, sweep.settings()[0], "x")
    assert _reward(config) == found and config.reward.hard_weight == 2.0


def test_what_the_base_leaves_open_stays_open_in_a_cell(tmp_path: Path) -> None:
    """A checkpoint decides the shape that nobody gave: in a sweep as in a run."""
    sweep = load_sweep(_write(tmp_path, 'name = "s"\n'))
    config = cell_config(TrainConfig(), sweep, {"model.hidden": 8}, "x")
    assert config.model.model_fields_set == {"hidden"}
