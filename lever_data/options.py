"""What options are made of: every option of lever is a field of a frozen pydantic model.

In go models and what a user gave, in a TOML file or as flags; out come validated models, or one
error that names the flag. Flags, help, TOML keys, docs and provenance all derive from the fields;
``cli/flags.py`` makes parameters of a command from :func:`options`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from lever_data.paths import uri_scheme
from lever_data.toml import Keys, dotted, refusal

Model = TypeVar("Model", bound=BaseModel)
Tables = dict[str, Any]  # options as given: section → name → value, at any depth
_REMOTE = ("s3", "gs", "az", "abfs", "abfss", "hdfs", "file")
MORE = "More"  # the panel of what is not needed every day

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Refusing(ModelMetaclass):
    """Makes a model that is built from Python with a wrong value our error, not pydantic's.

    An ``__init__`` would do so for sections inside others too, and lose the way to them.
    """

    if not TYPE_CHECKING:

        def __call__(cls, **values: Any) -> Any:  # noqa: N805 - of a metaclass it is a class
            try:
                return super().__call__(**values)
            except ValidationError as error:
                name = cls.__name__
                raise refusal(error, "the option", lambda keys: dotted((name, *keys))) from None


class Section(BaseModel, metaclass=_Refusing):
    """Options that belong together. Numbers are finite, texts hold no null character, paths are
    local."""

    # the schema is built when first used: a command pays for the sections it reads
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @field_validator("*")
    @classmethod
    def _without_null(cls, value: object) -> object:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and "\0" in str(text):
                raise ValueError("a text holds a null character, which no name or path can")
            scheme = uri_scheme(text) if isinstance(text, str | Path) else None
            # a text may be many things: with these schemes it is a file all the same
            if scheme is not None and (isinstance(text, Path) or scheme in _REMOTE):
                raise ValueError(f"{scheme}:// is not read or written here: copy it, or mount it")
        return value

    def but(self, **changes: Any) -> Self:
        """These options with some of them changed, validated anew."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | changes)


def words(
    help: str,
    flag: str | None = None,
    *,
    metavar: str | None = None,
    env: str | None = None,
    everyday: bool = False,
    argument: bool = False,
    output: bool = False,
    **constraints: Any,
) -> Any:
    """What an option says of itself, for ``Annotated`` types that several models share.

    Args:
        help: what the option does.
        flag: where it is not the field's name: ``--run``, or ``--on/--off`` for a switch.
        metavar: what stands for its value in the help.
        env: environment variable that gives it where the flag is not there.
        everyday: it comes first in the help, and not under "More".
        argument: it is given by its position, not by a flag.
        output: a file to write; a command looks whether it can before it works.
        constraints: bounds, as pydantic's ``Field`` takes them.
    """
    given = {"flag": flag, "metavar": metavar, "env": env}
    switches = {"everyday": everyday, "argument": argument, "output": output}
    extra: dict[str, Any] = {k: v for k, v in (given | switches).items() if v}
    return Field(description=help, json_schema_extra=extra, **constraints)


def option(default: Any, help: str, flag: str | None = None, **more: Any) -> Any:
    """A field with its default and :func:`words`; ``...`` makes it a required one."""
    names = ("metavar", "env", "everyday", "argument", "output")
    extra = {name: more.pop(name) for name in names if name in more}
    if flag:
        extra["flag"] = flag
    return Field(default, description=help, json_schema_extra=extra, **more)


@dataclass(frozen=True)
class Option:
    """One field as the command line sees it; ``keys`` lead to it from the command's model."""

    keys: tuple[str, ...]
    field: FieldInfo
    panel: str

    @property
    def key(self) -> str:
        """Name of the parameter: unique over all sections."""
        return "__".join(self.keys)

    @property
    def dotted(self) -> str:
        """The keys as TOML and sweeps write them: ``rce.lr``."""
        return dotted(self.keys)

    def said(self, name: str) -> Any:
        """What the definition says beside the help, such as its ``metavar``; None if nothing."""
        extra = self.field.json_schema_extra
        return extra.get(name) if isinstance(extra, dict) else None

    @property
    def flag(self) -> str:
        """``--rce-epochs``, or ``--on/--off`` of a switch that a file may have turned on."""
        flag = str(self.said("flag") or f"--{self.keys[-1].rstrip('_').replace('_', '-')}")
        is_pair = len(self.keys) > 2 or self.field.default is True
        return f"{flag}/--no-{flag[2:]}" if self.is_switch and is_pair and "/" not in flag else flag

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off and takes no value."""
        return self.field.annotation is bool

    @property
    def inner(self) -> Any:
        """The type of one value: of a list, of what may be None, of what has bounds."""
        kind: Any = self.field.annotation
        while (origin := get_origin(kind)) is not None and origin is not Literal:
            kind = next(inner for inner in get_args(kind) if inner is not type(None))
        return kind

    @property
    def is_list(self) -> bool:
        """Whether it has several values."""
        return get_origin(self.field.annotation) is tuple

    @property
    def is_numbers(self) -> bool:
        """Whether it is a list of numbers, written with commas."""
        return self.is_list and self.inner in (int, float)

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be given several times."""
        return self.is_list and not self.is_numbers

    @property
    def kind(self) -> Any:
        """The type of one value as the command line reads it."""
        is_model = isinstance(self.inner, type) and issubclass(self.inner, BaseModel)
        return str if self.is_numbers or is_model else self.inner

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be; empty where it may be any."""
        return get_args(self.inner) if get_origin(self.inner) is Literal else ()

    @property
    def help(self) -> str:
        """What the option does, and its default where it has one to speak of."""
        default = self.field.default
        text = str(self.field.description)
        if self.is_repeatable and not self.said("argument"):
            text = f"{text} Repeatable."
        if self.field.is_required():
            return text
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        return text if shown in (None, "", False) else f"{text} Default: {shown}."


class TablesOf:
    """In ``Annotated[Tables, TablesOf(Model)]``: the command takes what was given of the model's
    options by dotted name, unchecked, for it is to be laid over a file."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model


class Without:
    """Beside a section in ``Annotated``: options and sections in it that a command does not have,
    by the names of their fields."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)


def options(
    model: type[BaseModel],
    at: tuple[str, ...] = (),
    panel: str = MORE,
    left_out: frozenset[str] = frozenset(),
) -> Iterator[Option]:
    """Every option of a model and of the sections in it, in the order they are defined."""
    for name, field in model.model_fields.items():
        inner = section_of(field)
        if name in left_out:
            continue
        if inner is None and field.description:  # without one it is decided inside, by no user
            yield Option((*at, name), field, panel)
        elif inner is not None:
            title = re.split(r"[.;]", inner.__doc__ or "")[0].strip()
            names = (mark.names for mark in field.metadata if isinstance(mark, Without))
            without = left_out.union(*names)
            yield from options(inner, (*at, name), f"{MORE}: {title}", without)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, or is given as plain tables."""
    for mark in field.metadata:
        if isinstance(mark, TablesOf):
            return mark.model
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def tables_of(choices: Iterable[Option], flags: Mapping[str, Any]) -> Tables:
    """The flags that were given, by section and name; None and the empty list are not given."""
    tables: Tables = {}
    for item in choices:
        value = flags.get(item.key)
        if value is None or value == []:
            continue
        if item.is_numbers:
            value = tuple(word.strip() for word in ",".join(value).split(",") if word.strip())
        inner = tables
        for key in item.keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[item.keys[-1]] = value
    return tables


def flag_of(choices: Iterable[Option]) -> Any:
    """Names the flag that a value came from, by its keys."""
    known = {item.keys: item for item in choices}

    def name(keys: Keys) -> str:
        for end in range(len(keys), 0, -1):
            if item := known.get(tuple(map(str, keys[:end]))):
                return item.flag.split("/")[0]
        return dotted(keys)

    return name
