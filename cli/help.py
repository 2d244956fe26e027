"""``--help`` as plain text: nothing is cut at any width, and any console can show it.

Everyday options come first, the rest follow under "More", by what they belong to. A name that is
too long for its column has its help beneath it.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

_NUMBER = re.compile(r"[\d.]+(?:e-?\d+)?")
_NUMBERS = re.compile(rf"--[a-z-]+ {_NUMBER.pattern}(?:,{_NUMBER.pattern})*")


def _panels(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """What is written of each parameter, by panel: the everyday ones first."""
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else parameter.rich_help_panel or "Options"
            panels.setdefault(panel, []).append(record)
    return panels


def _write(panels: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    for panel, records in panels.items():
        if records:
            with formatter.section(panel):
                formatter.write_dl(records)


def _summary(help: str | None) -> str:
    """The first paragraph, on one line and whole."""
    return " ".join((help or "").split("\n\n")[0].split())


def _joined(words: list[str]) -> list[str]:
    """``--temps 1.0 1.3``, as argparse takes several numbers after one flag, is
    ``--temps 1.0,1.3``."""
    found: list[str] = []
    for word in words:
        if _NUMBER.fullmatch(word) and _NUMBERS.fullmatch(" ".join(found[-2:])):
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


class Help(TyperCommand):
    """A command with such a help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; where a command takes none by position, numbers belong to a flag."""
        by_position = any(p.param_type_name == "argument" for p in self.params)
        return super().parse_args(ctx, args if by_position else _joined(args))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by panel."""
        _write(_panels(self, ctx), formatter)


class Group(TyperGroup):
    """A group of commands with such a help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the everyday options, the commands, and the other options by panel."""
        panels = _panels(self, ctx)
        _write({name: panels.pop(name) for name in ("Arguments", "Options")}, formatter)
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        commands = [(name, _summary(command.help)) for name, command in found if command]
        _write({"Commands": commands, **panels}, formatter)
