"""Options from dataclasses: a field with ``help`` in its metadata is a flag, defined once.

In go dataclasses and the values typer parsed; out come commands with those options, and instances.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

Model = TypeVar("Model")


def with_flags(command: Any, *models: type, leave_out: Collection[str] = ()) -> Any:
    """The command, its ``**flags`` replaced by an option for every such field of ``models`` but
    those named in ``leave_out``."""
    own = inspect.signature(command, eval_str=True)
    fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        _parameter(model, f)
        for model in models
        for f in fields(model)
        if _is_flag(f) and f.name not in leave_out
    ]
    command.__signature__ = own.replace(parameters=[*fixed, *added])
    command.__annotations__ = {p.name: p.annotation for p in (*fixed, *added)}
    return command


def build(model: type[Model], flags: Mapping[str, Any], **fixed: Any) -> Model:
    """An instance from the flags that were given; ``fixed`` are fields that are no flags.

    Raises:
        UsageError: a list of numbers is none.
    """
    given = {
        f.name: _value(model, f, flags[_key(model, f)])
        for f in fields(model)  # type: ignore[arg-type]
        if _is_flag(f) and flags.get(_key(model, f)) is not None
    }
    return model(**given, **fixed)


def _is_flag(item: Field[Any]) -> bool:
    return "help" in item.metadata


def _key(model: type, item: Field[Any]) -> str:
    return f"{model.__name__.lower()}__{item.name}"


def _flag(item: Field[Any]) -> str:
    return str(item.metadata.get("flag", f"--{item.name.replace('_', '-')}"))


def _kind(model: type, item: Field[Any]) -> type:
    """The type of one value, None left out; a tuple is written as text with commas."""
    hint = get_type_hints(model)[item.name]
    inner = [a for a in get_args(hint) if a not in (type(None), Ellipsis)]
    kind: type = inner[0] if inner else hint
    return kind


def _is_list(item: Field[Any]) -> bool:
    return isinstance(item.default, tuple)


def _parameter(model: type, item: Field[Any]) -> inspect.Parameter:
    kind = str if _is_list(item) else _kind(model, item)
    flag = _flag(item)
    default: Any = item.default
    shown = ",".join(map(str, default)) if _is_list(item) else default
    speaks = shown not in (None, "", False, MISSING)
    text = item.metadata["help"] + (f" Default: {shown}." if speaks and kind is not bool else "")
    names = (f"{flag}/--no-{flag[2:]}",) if kind is bool and item.default else (flag,)
    option = typer.Option(
        *names,
        help=text.replace("[", "\\["),
        metavar=item.metadata.get("metavar"),
        rich_help_panel=(model.__doc__ or "").strip().splitlines()[0].rstrip("."),
        show_default=False,
    )
    return inspect.Parameter(
        _key(model, item),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _value(model: type, item: Field[Any], given: Any) -> Any:
    if not _is_list(item):
        return given
    kind = _kind(model, item)
    try:
        return tuple(kind(word) for word in given.split(",") if word.strip())
    except ValueError:
        from lever_data.errors import UsageError

        raise UsageError(f"{_flag(item)} is a list of numbers", value=given, hint="1,2,3") from None
