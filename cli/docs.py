"""The pages that are made from the code: ``python -m lever_cli.docs`` prints docs/cli.md, every
command and option, and ``python -m lever_cli.docs pipeline`` docs/pipeline.md.

In goes the command tree; out comes Markdown on stdout. A test compares it with the file.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from typer.main import get_command

from lever_data.catalog import reward_modes
from lever_data.reward_modes import RewardMode

from .app import command_line
from .docs_pipeline import render_pipeline

_HEAD = """# Commands

Made by `python -m lever_cli.docs > docs/cli.md`; do not edit. Results go to stdout, notices and
progress to stderr. Exit codes: 0 done, 1 a problem with the data (or a gate that failed), 2 a
malformed request, 130 interrupted. `lever --install-completion` lets the shell complete commands,
options and their words. What a command needs every day comes first, the rest under "More".
"""
_MODES = """## Reward modes

What `--reward-mode` and `reward.mode` take; each is a file `sql/macros/reward_<mode>.sql`.
"""
_LISTS = re.compile(r"<list\[(\w+)\]>")  # repeatable options: the type of one value
_MARKUP = re.compile(r"\[/?(?:bold|dim|italic)\]")


def render() -> str:
    """The Markdown of all commands, by name."""
    root: Any = get_command(command_line())
    parts = [_HEAD]
    for name in sorted(root.commands):
        parts += _command(f"lever {name}", root.commands[name])
    return "\n".join([*parts, _MODES, *map(_mode, reward_modes().values()), ""])


def _mode(mode: RewardMode) -> str:
    columns = dict.fromkeys(column for read in mode.reads for column, _ in read.columns)
    return f"- `{mode.name}`: {mode.purpose} It reads {', '.join(f'`{c}`' for c in columns)}."


def _command(path: str, command: Any) -> list[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    parts = [f"## `{path}`\n", _text(command.help or ""), ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    if arguments:
        parts += [f"- `{_argument(p)}`: {_text(p.help or '')}" for p in arguments] + [""]
    panels: dict[str, list[str]] = {}
    for option in command.params:
        record = option.get_help_record(context)
        if option.param_type_name == "option" and record is not None and option.name != "help":
            flags, text = record
            line = f"- `{_text(flags)}`" + (f": {_text(text)}" if text else "")
            panels.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(line)
    for panel, lines in panels.items():
        parts += [*([f"**{_text(panel)}**\n"] if panel else []), *lines, ""]
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        parts += _command(f"{path} {name}", inner)
    return parts


def _argument(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _text(text: str) -> str:
    """Help without markup, its line breaks within a paragraph joined."""
    plain = _LISTS.sub(r"<\1>", _MARKUP.sub("", text)).replace("\\[", "[").replace("\b", "")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", plain)]
    return "\n\n".join(p for p in paragraphs if p)


if __name__ == "__main__":
    pages = {"cli": render, "pipeline": render_pipeline}
    parser = argparse.ArgumentParser(prog="python -m lever_cli.docs")
    parser.add_argument("page", nargs="?", choices=pages, default="cli")
    print(pages[parser.parse_args().page](), end="")
