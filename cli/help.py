"""``--help`` as plain text: nothing is cut at any width, and any console can show it.

Everyday options come first, the rest follow under "More", by what they belong to. A name that is
too long for its column has its help beneath it.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _write_panels(command: Any, context: Any, formatter: Any) -> None:
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else parameter.rich_help_panel or "Options"
            panels.setdefault(panel, []).append(record)
    for panel, records in panels.items():
        if records:
            with formatter.section(panel):
                formatter.write_dl(records)


class Help(TyperCommand):
    """A command with such a help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by panel."""
        _write_panels(self, ctx, formatter)


class Group(TyperGroup):
    """A group of commands with such a help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by panel, then the commands."""
        _write_panels(self, ctx, formatter)
        self.format_commands(ctx, formatter)
