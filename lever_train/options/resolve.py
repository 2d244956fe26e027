"""Options from a TOML file and from flags become a TrainConfig, and back to TOML.

In go a file and the flags given on the command line; out comes a validated config. A flag beats
the file, the file beats the default; an unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from lever_data.errors import UsageError
from lever_train.options.toml import Keys, dotted, read_toml, require_fields, validated
from lever_train.options.train import Section, TrainConfig

SFT_VIEW = "beam_infoscore"  # what SFT trains on where no view is named
Sections = dict[str, dict[str, Any]]  # options as given: section → name → value
_GIVE_REWARD = ("mode", "expression")


@dataclass(frozen=True)
class Option:
    """One field as the command line sees it."""

    section: str
    name: str
    flag: str  # "--rce-epochs", or "--on/--off"
    field: FieldInfo
    panel: str

    @property
    def key(self) -> str:
        """Name of the parameter: unique over all sections."""
        return f"{self.section}__{self.name}"

    @property
    def dotted(self) -> str:
        """Section and name, as a sweep writes them: ``rce.lr``."""
        return f"{self.section}.{self.name}"

    @property
    def base(self) -> tuple[type, bool]:
        """The Python type of one value, and whether the option is repeatable."""
        kind = self.field.annotation
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            return (str, False) if self.is_numbers else (inner, True)
        if get_origin(kind) is Literal:
            return str, False
        given = [a for a in get_args(kind) if a is not type(None)]
        if given:
            kind = given[0]
        return (kind if isinstance(kind, type) else str), False

    @property
    def is_numbers(self) -> bool:
        """Whether it is a list of numbers, written with commas."""
        kind = self.field.annotation
        return get_origin(kind) is tuple and get_args(kind)[0] in (int, float)

    @property
    def declarations(self) -> tuple[str, ...]:
        """What the command line is told: the flag, or both flags of a switch."""
        return (self.flag,)

    @property
    def help(self) -> str:
        """What the option does, and its default where it has one to speak of."""
        default = self.field.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        text = str(self.field.description)
        return text if shown in (None, "", False) else f"{text} Default: {shown}."

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, where they are listed."""
        kind = self.field.annotation
        return tuple(get_args(kind)) if get_origin(kind) is Literal else ()


def options() -> Iterator[Option]:
    """Every option, in the order of the sections."""
    for section, field in TrainConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        panel = f"[{section}] {(model.__doc__ or '').strip().rstrip('.')}"
        for name, inner in model.model_fields.items():
            extra = inner.json_schema_extra
            flag = f"--{name.replace('_', '-')}"
            if inner.annotation is bool:
                flag = f"{flag}/--no-{flag[2:]}"
            if isinstance(extra, dict) and "flag" in extra:
                flag = str(extra["flag"])
                if inner.annotation is bool and "/" not in flag:
                    flag = f"{flag}/--no-{flag[2:]}"
            yield Option(section, name, flag, inner, panel)


def resolve(file: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Defaults, then the file, then the flags (by :attr:`Option.key`; None: not given).

    Raises:
        UsageError: the file cannot be read, or a key or value is not allowed; an unknown key
            comes with the nearest one.
    """
    tables = _read_sections(file) if file is not None else {}
    lay_over(tables, _sections_of(flags))
    if tables.get("run", {}).get("stage") == "sft":
        tables.setdefault("data", {}).setdefault("view", [SFT_VIEW])
    return validated(TrainConfig, tables, "the option", _flag_of)


def lay_over(tables: Sections, changes: Mapping[str, Mapping[str, Any]]) -> None:
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


def to_toml(config: TrainConfig) -> str:
    """The resolved config as TOML; an option that is not set is left out, and so is the reward's
    mode beside an expression, so that :func:`resolve` takes it back."""
    lines: list[str] = []
    left_out = {"reward": {"mode"}} if config.reward.expression is not None else None
    for section, values in config.model_dump(mode="json", exclude=left_out).items():
        lines.append(f"[{section}]")
        lines += [f"{k} = {_toml(v)}" for k, v in values.items() if v is not None]
        lines.append("")
    return "\n".join(lines)


def _sections_of(flags: Mapping[str, Any]) -> Sections:
    """The flags that were given, by section and name."""
    tables: Sections = {}
    for item in options():
        value = flags.get(item.key)
        if value is not None and value != []:
            if item.is_numbers:
                value = tuple(word.strip() for word in value.split(","))
            tables.setdefault(item.section, {})[item.name] = value
    return tables


def _read_sections(file: Path) -> Sections:
    tables = read_toml(file, "the config")
    require_fields(TrainConfig, tables, "the config", str(file))
    for section, values in tables.items():
        if not isinstance(values, dict):
            raise UsageError("a section of the config is not a table", where=f"{file}: {section}")
    return tables


def _flag_of(keys: Keys) -> str:
    for item in options():
        if keys[:2] == (item.section, item.name):
            return f"{item.flag.split('/')[0]} ([{item.section}] {item.name})"
    return dotted(keys)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return repr(value)
