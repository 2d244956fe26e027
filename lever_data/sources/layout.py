"""What the two tables of RL data share while they are made: layout, context, and the proof.

The number of string tokens that a batch accounts for is a proof: where it equals the number of
string tokens in the text, no member of any object was dropped (a decoder keeps only the last of
two equal keys, silently).

Columns cannot say whether a key was absent or null, nor how an eval mode was spelled. What most
records of a file have in common stands once in its :class:`Layout`; a row that deviates says so
under ``extra._lever``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa
from msgspec import UNSET

from lever_data.sources.types import INFO_FIELDS, Made, Types

Record = tuple[int, Any]  # query id, Value


class RefusedError(Exception):
    """The fast path does not take this text; the careful path says whether it is wrong."""


@dataclass(frozen=True)
class Layout:
    """What the records of one file have in common; stands in the manifest's details.

    Attributes:
        candidate_keys: known keys of a candidate.
        value_keys: known keys of a query's value.
        query_keys: all keys of its ``query`` object; ``None`` where it has none.
        file_mode: how eval mode ``file`` is written: ``file`` or ``vqaEval``.
    """

    candidate_keys: tuple[str, ...]
    value_keys: tuple[str, ...]
    query_keys: tuple[str, ...] | None
    file_mode: str


@dataclass(frozen=True)
class Context:
    """What every row of a file shares; ``scorer`` is ``_meta.vqa_model`` where there is one."""

    dataset: str
    split: str
    scorer: str | None


@dataclass(frozen=True)
class Built:
    """Two record batches of one block, and the string tokens of the text they account for.

    ``tokens`` is -1 where records carry keys outside the types, as those of the careful path may.
    """

    candidates: pa.RecordBatch
    queries: pa.RecordBatch
    tokens: int


def count_strings(value: object) -> int:
    """Strings in a JSON value, keys included."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list | tuple):
        return sum(map(count_strings, value))
    if isinstance(value, dict):
        return len(value) + sum(map(count_strings, value.values()))
    return 0


def repeat(text: str | None, rows: int) -> pa.Array:
    """A column of one text. Arrow looks for a module on disk whenever it has to guess a type."""
    return pa.repeat(pa.scalar(text, pa.string()), rows)


def to_json(value: object) -> str | None:
    """Compact JSON text; ``None`` for nothing."""
    return None if value is None else msgspec.json.encode(value).decode()


def present(struct: Made, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the named fields that a struct has."""
    return tuple(name for name in names if getattr(struct, name) is not UNSET)


def learned_keys(struct: Made, names: Sequence[str]) -> dict[str, Any]:
    """The unknown keys of a struct; ``names`` are those its type has learned, in order."""
    found = {name: getattr(struct, f"extra{i}") for i, name in enumerate(names)}
    known = {name: value for name, value in found.items() if value is not UNSET}
    return known if struct.rest is UNSET else known | struct.rest


def info_keys(value: Made, types: Types) -> tuple[str, ...] | None:
    """All keys of a value's ``query`` object; ``None`` where it has none."""
    if not value.query:
        return None
    return (*present(value.query, INFO_FIELDS), *sorted(learned_keys(value.query, types.info)))
