"""TOML becomes a pydantic model, or an error that says what stands where.

In go a file, the model and how to name the place of a value; out comes the validated model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lever_data.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[int | str, ...]  # the way to a value: names of tables and keys, positions in lists


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        path: the file.
        what: what it is to hold, as the error names it: "the config".

    Raises:
        UsageError: it cannot be read, or it is not TOML.
    """
    import tomllib  # 5 ms of every command

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror})", where=str(path)) from None
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply", where=str(path)) from None
    except ValueError as error:  # of TOML, of UTF-8, or of an integer of thousands of digits
        raise UsageError(f"{what} is not TOML ({error})", where=str(path)) from None


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file, or of a YAML one where its name ends so.

    Raises:
        UsageError: it cannot be read, is neither, or its top is not a mapping.
    """
    if path.suffix not in (".yaml", ".yml"):
        return read_toml(path, what)
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror})", where=str(path)) from None
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply", where=str(path)) from None
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{what} is not YAML ({said})", where=str(path)) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"{what} is not a mapping of names to options", where=str(path))
    return found


def require_known(keys: Iterable[str], known: Iterable[str], what: str, where: str) -> None:
    """Refuse keys that do not exist.

    Args:
        keys: what was given.
        known: the keys there are.
        what: what holds them, as the error names it: "the config".
        where: the place they stand in, as the error names it: "lever.toml: [data]".

    Raises:
        UsageError: the first unknown key, and the nearest there is, or all of them.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
            raise UsageError(f"unknown key in {what}", where=where, value=key, hint=hint)


def require_fields(
    model: type[BaseModel], tables: Mapping[str, Any], what: str, where: str
) -> None:
    """:func:`require_known` for the tables of a model and those inside them.

    Raises:
        UsageError: the first key that the model has no field for.
    """
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    sections = {n: k for n, k in kinds.items() if isinstance(k, type) and issubclass(k, BaseModel)}
    # a field without a description is decided inside and no option
    known = [n for n, f in model.model_fields.items() if f.description or n in sections]
    require_known(tables, known, what, where)
    for key, value in tables.items():
        if isinstance(value, dict) and key in sections:
            require_fields(sections[key], value, what, f"{where}: [{key}]")


def validated(
    model: type[Model], tables: Mapping[str, Any], what: str, where: Callable[[Keys], str]
) -> Model:
    """The model of parsed TOML tables.

    Args:
        model: what the tables are to be.
        tables: what was given.
        what: what was given, as the error names it: "the config".
        where: the place of a value, as the error names it, from its keys.

    Raises:
        UsageError: the first value that is not allowed, its place, and why.
    """
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise refusal(error, what, where) from None
    except UsageError as error:  # of a validator, which does not know where the values stand
        raise UsageError(
            error.what, where=error.where or where(()), value=error.value, hint=error.hint
        ) from None


def refusal(error: ValidationError, what: str, where: Callable[[Keys], str]) -> UsageError:
    """The first thing pydantic found wrong, as :func:`validated` says it."""
    first = error.errors()[0]
    is_tuple = first["type"] == "tuple_type"  # what pydantic calls it, and no user does
    why = "a list is meant" if is_tuple else first["msg"].removeprefix("Value error, ")
    return UsageError(
        f"{what} is not allowed: {why}",
        where=where(first["loc"]),
        value=first["input"] if not isinstance(first["input"], dict) else None,
    )


def inside(file: str) -> Callable[[Keys], str]:
    """Names places in a file: ``lever.toml: eval.oracle``."""
    return lambda keys: f"{file}: {dotted(keys)}" if keys else file


def dotted(keys: Keys) -> str:
    """Keys as TOML writes them: ``eval.oracle``."""
    return ".".join(str(key) for key in keys)
