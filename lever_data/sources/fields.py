"""The records of legacy RL and beam data: their keys, the columns these map to, and their types.

One table says what a candidate may hold (:data:`CANDIDATE_FIELDS`); from it comes the msgspec type
that decodes a block of text at once. Keys that it does not know are a record's :class:`Rest` and
end in the column ``extra``, so that nothing is lost.

Columns cannot say whether a key was absent or null, nor how an eval mode was spelled. What most
records of a file have in common stands once in its :class:`Layout`; a row that deviates says so
under ``extra._lever``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import pyarrow as pa
from msgspec import UNSET, Meta, UnsetType

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place

OnFault = Callable[[LeverError], None]
Struct = Any  # of a type made below from a table of fields
RESERVED = "_lever"  # member of `extra` that holds what export needs and columns cannot say

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ExampleId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PoolPosition = Annotated[int, Meta(ge=0, le=2**15 - 1)]
Bit = Annotated[int, Meta(ge=0, le=1)]
Shot = Annotated[int, Meta(ge=0, le=127)]
Rank = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0)]
LogProb = Annotated[float, Meta(le=1e-4)]  # float32 sums of log-softmaxes may end just above 0
Ids = Annotated[list[ExampleId], Meta(max_length=127)]  # none: nothing is shown
EvalMode = Literal["file", "vqaEval", "fallback", "simple_match", "error"]

# How the store names a mode; a row of mode `error` is a failed one (`eval_failed`).
EVAL_MODES = {"vqaEval": "file", "simple_match": "fallback", "error": None}


class ShotScore(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The score of the prompt that holds the first ``shot`` demonstrations, in its legacy keys."""

    shot: Shot
    vqa_correct: Bit | None
    vqa_acc_score: Fraction | None
    vqa_gt_prob: Fraction | None
    vqa_pred_answer: str | None
    eval_mode: str | None


# legacy key → (column of schema.CANDIDATES, type in JSON)
CANDIDATE_FIELDS: dict[str, tuple[str, Any]] = {
    "pointer": ("pointer", Ids),
    "gen_method": ("gen_method", str),
    "beam_rank": ("beam_rank", Rank),
    "beam_score": ("beam_score", float),
    "logprob_score": ("logprob_score", LogProb),
    "temperature": ("temperature", Temperature),
    "vqa_pred_answer": ("answer", str),
    "vqa_correct": ("correct", Bit),
    "vqa_acc_score": ("score", Fraction),
    "vqa_eval_mode": ("eval_mode", EvalMode),
    "pointer_pos": ("pointer_pos", list[PoolPosition]),
    # Where it stands, or candidate_pool_ids, `pointer` holds positions in the pool.
    "pointer_global": ("pointer", Ids),
    "vqa_raw_generation": ("generation", str),
    "vqa_gt_prob": ("expected_score", Fraction),
    "vqa_rel_token_f1": ("token_f1", Fraction),
    "vqa_rel_edit_sim": ("edit_sim", Fraction),
    "vqa_rel_score": ("similarity", Fraction),
    "eval_split_used": ("eval_split", str),
    "eval_failed": ("eval_failed", bool),
    # Not legacy: what lever's own rollouts add, so that their export comes back whole.
    "error": ("error", str),
    "info_score": ("info_score", float),
    "shot_scores": ("shot_scores", list[ShotScore]),
    "scorer": ("scorer", str),
    "metric_version": ("metric", str),
    "policy": ("policy", str),
}

INFO_FIELDS: dict[str, Any] = {
    "query_id": Int64,
    "question_id": Int64,
    "image_id": Int64,
    "question": str,
    "gt_answers_raw": list[str | dict[str, Any]],
}

POOL_FIELDS = ("candidate_pool_indices", "candidate_pool_ids")
GEN_METHODS = ("beam", "sample", "random", "retrieval")  # others are kept, and named at ingest
VALUE_FIELDS = ("pointer_candidates", "query", *POOL_FIELDS)


class BeamValue(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One query of InfoScore beam data: id lists that end with the query's id, best first."""

    id_list: list[list[ExampleId]]
    score_list: list[float | None]


def _struct(name: str, fields: dict[str, Any], required: str | None = None) -> type[msgspec.Struct]:
    """A struct whose fields are UNSET where a key is absent; unknown keys are passed over."""
    found: list[Any] = [
        (key, kind) if key == required else (key, kind | None | UnsetType, UNSET)
        for key, kind in fields.items()
    ]
    return msgspec.defstruct(name, found, gc=False)


Candidate = _struct(
    "Candidate", {key: kind for key, (_, kind) in CANDIDATE_FIELDS.items()}, "pointer"
)
Info = _struct("Info", INFO_FIELDS)
Value = _struct(
    "Value",
    {
        "pointer_candidates": list[Candidate],  # type: ignore[valid-type]
        "query": Info,
        **dict.fromkeys(POOL_FIELDS, list[ExampleId]),
    },
    "pointer_candidates",
)


class Rest(NamedTuple):
    """The keys of one query that lever does not know."""

    candidates: list[dict[str, Any]]
    info: dict[str, Any]
    value: dict[str, Any]

    @classmethod
    def of(cls, value: dict[str, Any]) -> Rest:
        """The unknown keys of a parsed query."""
        return cls(
            [_without(record, CANDIDATE_FIELDS) for record in value["pointer_candidates"]],
            _without(value.get("query") or {}, INFO_FIELDS),
            _without(value, VALUE_FIELDS),
        )

    def has_reserved(self) -> bool:
        """Whether a record has the key that lever keeps for itself."""
        return any(RESERVED in record for record in (*self.candidates, self.info, self.value))


def _without(record: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in known}


class Record(NamedTuple):
    """One query; ``rest`` is ``None`` where it has no unknown key, or none was looked for."""

    query_id: int
    value: Struct
    rest: Rest | None = None


class RefusedError(Exception):
    """The fast path does not take this text; the careful path says whether it is wrong."""


class FaultError(Exception):
    """What is wrong with a query's value, and in which field."""

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.what = what
        self.path = path


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

    def spelled(self, mode: str | None) -> str | None:
        """How the file writes a mode, where a row does not say otherwise."""
        return self.file_mode if mode == "file" else mode


@dataclass(frozen=True)
class Context:
    """What every row of a file shares; ``scorer`` is ``_meta.vqa_model`` where there is one."""

    dataset: str
    split: str
    scorer: str | None


@dataclass(frozen=True)
class Batches:
    """Two record batches of one block, and the string tokens of the text they account for.

    The count is a proof: where it equals the number of string tokens in the text, no member of any
    object was dropped (a decoder keeps only the last of two equal keys, silently).
    """

    candidates: pa.RecordBatch
    queries: pa.RecordBatch
    tokens: int


class Format(Protocol):
    """What the reader must know of a kind of data: RL data or beams."""

    context: Context

    def read_block(self, text: bytes) -> Batches:
        """The batches of an object's text, all of it proven to be there, or RefusedError."""

    def read_value(
        self,
        query_id: int,
        value: object,
        data: bytes,
        place: Place,
        on_fault: OnFault | None = None,
    ) -> Record:
        """One member's value, or a LeverError; ``on_fault`` is told of a part left out instead."""

    def build(self, records: Sequence[Record]) -> Batches:
        """The batches of records that were read one by one."""


def present(struct: Struct, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the named fields that a struct has."""
    return tuple(name for name in names if getattr(struct, name) is not UNSET)


def info_keys(record: Record) -> tuple[str, ...] | None:
    """All keys of a query's ``query`` object; ``None`` where it has none."""
    if not record.value.query:
        return None
    rest = record.rest.info if record.rest else {}
    return (*present(record.value.query, INFO_FIELDS), *sorted(rest))


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


def decode_typed(
    decoder: msgspec.json.Decoder[Any], value: object, data: bytes, place: Place
) -> Any:
    """A value, parsed from ``data`` before, as the decoder's type.

    Raises:
        LeverError: the type does not take it, with field and offset.
    """
    try:
        return decode_text(decoder, json_exact.encode(value, data, place), data, place)
    except FaultError as fault:
        raise place.field_error(fault.what, data, fault.path) from None


def decode_text(decoder: msgspec.json.Decoder[Any], text: bytes, data: bytes, place: Place) -> Any:
    """The clean text of a value as the decoder's type.

    Raises:
        FaultError: the type does not take it.
        LeverError: it is nested too deeply.
    """
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _fault(str(error)) from None
    except RecursionError:
        raise place.error("the value is nested too deeply", value=data[:40]) from None


_ERROR_PATH = re.compile(r"^(.*) - at `(?:key` in `)?\$([^`]*)`$", re.DOTALL)
_PATH_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def _fault(message: str) -> FaultError:
    """A decoder's message, split into what is wrong and the path of the field."""
    match = _ERROR_PATH.match(message)
    if match is None:
        return FaultError(message)
    parts = _PATH_PART.findall(match.group(2))
    what = match.group(1)
    where = {name for name, _ in parts}
    if "`int`, got `str`" in what and where & {"pointer", *POOL_FIELDS}:
        what += ": an example is named by its place in its split, not by its id"
    return FaultError(what, *(int(i) if i else name for name, i in parts))
