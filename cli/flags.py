"""A command from its signature: every parameter that is a model becomes the flags of its fields.

In goes a function whose parameters are models (:class:`lever_data.options.Section`) or
``Annotated`` words of :mod:`lever_data.vocabulary`; out comes the function typer wants, which
validates what was given and calls the first with the models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, create_model

from lever_data.options import (
    Option,
    Section,
    Tables,
    TablesOf,
    flag_of,
    options,
    section_of,
    tables_of,
)
from lever_data.toml import validated
from lever_data.vocabulary import STDOUT

Command = Callable[..., None]
_LONGEST_CHOICES = 48  # characters that stand beside a flag in 80 columns; else in the help


def with_flags(command: Command) -> Command:
    """The command as typer wants it."""
    own = inspect.signature(command, eval_str=True)
    context = [p for p in own.parameters.values() if p.annotation is typer.Context]
    fields: dict[str, Any] = {
        f"{p.name}_": (p.annotation, ... if p.default is p.empty else p.default)
        for p in own.parameters.values()
        if p not in context
    }
    # the underscore keeps `json` apart from the method of that name
    model = create_model("Flags", __base__=Section, **fields)
    choices = list(options(model))

    @wraps(command)
    def run(**flags: Any) -> None:
        given = {p.name: flags.pop(p.name) for p in context}
        tables = tables_of(choices, flags)
        for name, field in model.model_fields.items():
            if section_of(field) is not None:  # of which nothing was given: its defaults
                tables.setdefault(name, {})
            if any(isinstance(mark, TablesOf) for mark in field.metadata):
                tables[name] = _by_dotted_name(tables[name])
        built = validated(model, tables, "the option", flag_of(choices))
        _require_writable(built)
        command(**given, **{name[:-1]: getattr(built, name) for name in fields})

    parameters = [*context, *map(_parameter, choices)]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _by_dotted_name(tables: Tables) -> dict[str, Any]:
    """Values of sections by dotted names, such as ``rce.lr``."""
    return {f"{s}.{name}": value for s, inner in tables.items() for name, value in inner.items()}


def _require_writable(built: BaseModel) -> None:
    """Refuse files that cannot be written before the work that would fill them."""
    files = [
        path
        for name, field in type(built).model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("output")
        if isinstance(path := getattr(built, name), Path) and path != STDOUT
    ]
    if files:
        from lever_data.store.files import require_writable

        require_writable(files)


def _parameter(item: Option) -> inspect.Parameter:
    """An option as a parameter of the command; ``None`` means not given."""
    metavar, text = item.said("metavar"), item.help
    if item.said("argument"):
        metavar = metavar or item.keys[-1].strip("_").upper()
    if item.is_numbers:
        metavar = metavar or "N,N"
    if len("|".join(item.choices)) > _LONGEST_CHOICES:
        metavar, text = "WORD", f"{text} One of: {', '.join(item.choices)}."
    common: dict[str, Any] = {"help": text, "metavar": metavar}
    is_required = item.field.is_required()
    if item.said("argument"):
        made: Any = typer.Argument(**common, show_default=False)
    else:
        made = typer.Option(
            *item.flag.split(" "),
            **common,
            envvar=item.said("env"),
            rich_help_panel=None if item.said("everyday") or is_required else item.panel,
            show_default=False,
        )
    default: Any = [] if item.is_list else None
    return inspect.Parameter(
        item.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else default,
        annotation=Annotated[_annotated(item), made],
    )


def _annotated(item: Option) -> Any:
    kind: Any = item.kind
    if item.is_list:  # numbers may stand behind one flag with commas, or behind several
        return list[kind]
    return kind if item.field.is_required() else kind | None
