"""``--help`` as plain text: nothing is cut at any width, and any console can show it.

Everyday options come first, the rest follow under "More", by what they belong to. A name that is
too long for its column has its help beneath it.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


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


class Help(TyperCommand):
    """A command with such a help."""

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
