"""Options from a TOML or YAML file and from flags become a TrainConfig, and back to TOML.

In go a file and the flags given on the command line; out comes a validated config. A flag beats
the file, the file beats the default; an unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from lever_data.errors import UsageError
from lever_data.options import Tables, options
from lever_data.toml import Keys, dotted, read_tables, require_fields, validated
from lever_train.options.train import TrainConfig

SFT_VIEW = "beam_infoscore"  # what SFT trains on where no view is named
_GIVE_REWARD = ("mode", "expression")


def resolve(file: Path | None, given: Mapping[str, Any]) -> TrainConfig:
    """Defaults, then the file, then what was ``given`` by its dotted name: ``rce.lr``.

    Raises:
        UsageError: the file cannot be read, or a key or value is not allowed; an unknown key
            comes with the nearest one.
    """
    tables = _read_sections(file) if file is not None else {}
    lay_over(tables, by_section(given))
    if tables.get("run", {}).get("stage") == "sft":
        tables.setdefault("data", {}).setdefault("view", [SFT_VIEW])
    return validated(TrainConfig, tables, "the option", _flag_of)


def lay_over(tables: Tables, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set options in ``tables`` that beat those there.

    A mode and an expression are two ways to give one thing, the reward: whichever the changes
    name, neither stays of those there.
    """
    for section, values in changes.items():
        there = tables.setdefault(section, {})
        if section == "reward" and not values.keys().isdisjoint(_GIVE_REWARD):
            for name in _GIVE_REWARD:
                there.pop(name, None)
        there.update(values)


def by_section(given: Mapping[str, Any]) -> Tables:
    """Values by dotted names, such as ``rce.lr``, as tables."""
    tables: Tables = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables


def to_toml(config: TrainConfig) -> str:
    """The resolved config as TOML; an option that is not set is left out, and so is the reward's
    mode beside an expression, so that :func:`resolve` takes it back."""
    left_out = {"reward": {"mode"}} if config.reward.expression is not None else None
    return tomli_w.dumps(config.model_dump(mode="json", exclude=left_out, exclude_none=True))


def changes_toml(config: TrainConfig) -> str:
    """What of the config is not the default, as TOML."""
    given = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return tomli_w.dumps(given)


def _read_sections(file: Path) -> Tables:
    tables = read_tables(file, "the config")
    require_fields(TrainConfig, tables, "the config", str(file))
    for section, values in tables.items():
        if not isinstance(values, dict):
            raise UsageError("a section of the config is not a table", where=f"{file}: {section}")
    return tables


def _flag_of(keys: Keys) -> str:
    for item in options(TrainConfig):
        if keys[:2] == item.keys:
            return f"{item.flag.split('/')[0]} ([{keys[0]}] {keys[1]})"
    return dotted(keys)
