"""The records of legacy RL and beam data as typed structs, and how their keys map to columns.

One table says what a candidate may hold (:data:`CANDIDATE_FIELDS`); from it come the msgspec
types that decode a block of text at once. Keys that the table does not know are learned from the
file as it is read (:class:`Types`), so that files with keys of their own stay fast and lose
nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Made = Any  # a struct of a type made at run time, see Types
RESERVED = "_lever"  # member of `extra` that holds what export needs and columns cannot say
REST = "rest"  # field of a struct: unknown keys of the careful path; RESERVED in JSON
MAX_LEARNED = 64

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ExampleId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PoolPosition = Annotated[int, Meta(ge=0, le=2**15 - 1)]
Bit = Annotated[int, Meta(ge=0, le=1)]
Shot = Annotated[int, Meta(ge=0, le=127)]
EvalMode = Literal["file", "vqaEval", "fallback"]


class ShotScore(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The score of the prompt that holds the first ``shot`` demonstrations."""

    shot: Shot
    vqa_correct: Bit | None
    vqa_acc_score: float | None
    vqa_gt_prob: float | None
    vqa_pred_answer: str | None
    eval_mode: str | None


# legacy key → (column of schema.CANDIDATES, type in JSON)
CANDIDATE_FIELDS: dict[str, tuple[str, Any]] = {
    "pointer": ("pointer", Annotated[list[ExampleId], Meta(min_length=1, max_length=127)]),
    "gen_method": ("gen_method", str),
    "beam_rank": ("beam_rank", Int32),
    "beam_score": ("beam_score", float),
    "logprob_score": ("logprob_score", float),
    "temperature": ("temperature", float),
    "vqa_pred_answer": ("vqa_pred_answer", str),
    "vqa_correct": ("vqa_correct", Bit),
    "vqa_acc_score": ("vqa_acc_score", float),
    "vqa_eval_mode": ("eval_mode", EvalMode),
    "pointer_pos": ("pointer_pos", list[PoolPosition]),
    "vqa_raw_generation": ("vqa_raw_generation", str),
    "vqa_gt_prob": ("vqa_gt_prob", float),
    "vqa_rel_token_f1": ("vqa_rel_token_f1", float),
    "vqa_rel_edit_sim": ("vqa_rel_edit_sim", float),
    "vqa_rel_score": ("vqa_rel_score", float),
    "eval_split_used": ("eval_split", str),
    "eval_failed": ("eval_failed", bool),
    # Not legacy: what lever's own rollouts add, so that their export comes back whole.
    "error": ("error", str),
    "info_score": ("info_score", float),
    "shot_scores": ("shot_scores", list[ShotScore]),
    "scorer": ("scorer", str),
    "metric_version": ("metric_version", str),
    "policy": ("policy", str),
}

INFO_FIELDS: dict[str, Any] = {
    "query_id": Int64,
    "question_id": Int64,
    "image_id": Int64,
    "question": str,
    "gt_answers_raw": list[str],
}

VALUE_FIELDS = ("pointer_candidates", "query", "candidate_pool_indices")


class BeamValue(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One query of InfoScore beam data: id lists that end with the query's id, best first."""

    id_list: list[list[ExampleId]]
    score_list: list[float | None]


@dataclass
class Types:
    """The struct types for one file: known keys, and the unknown ones met so far.

    ``candidate``, ``info`` and ``value`` list the learned keys of a candidate, of the ``query``
    object and of a query's value; ``known`` the known keys a candidate may have.
    """

    candidate: list[str] = field(default_factory=list)
    info: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)
    known: Collection[str] = tuple(CANDIDATE_FIELDS)

    def __post_init__(self) -> None:
        self._build()

    def learn(self, candidate: set[str], info: set[str], value: set[str]) -> None:
        """Take unknown keys into the types, up to MAX_LEARNED of a kind."""
        before = self.version
        for known, new in (
            (self.candidate, candidate),
            (self.info, info),
            (self.value, value),
        ):
            fresh = sorted(filter(_can_be_field, new - set(known)))
            known += fresh[: MAX_LEARNED - len(known)]
        if self.version != before:
            self._build()

    def narrowed(self, known: Collection[str]) -> Types:
        """These types for candidates that have no known key but ``known``: less to decode."""
        return Types(list(self.candidate), list(self.info), list(self.value), known)

    @property
    def version(self) -> tuple[int, int, int]:
        """Grows whenever a key is learned."""
        return len(self.candidate), len(self.info), len(self.value)

    def _build(self) -> None:
        fields = CANDIDATE_FIELDS.items()
        known = [(name, kind) for name, (_, kind) in fields if name in self.known]
        self.candidate_type = _struct("Candidate", known, ("pointer",), self.candidate)
        self.info_type = _struct("Info", list(INFO_FIELDS.items()), (), self.info)
        value = [
            ("pointer_candidates", list[self.candidate_type]),  # type: ignore[name-defined]
            ("query", self.info_type),
            ("candidate_pool_indices", list[ExampleId]),
        ]
        self.value_type = _struct("Value", value, ("pointer_candidates",), self.value)
        self.block_decoder = msgspec.json.Decoder(dict[int, self.value_type])  # type: ignore[name-defined]
        self.value_decoder = msgspec.json.Decoder(self.value_type)


def _struct(
    name: str, known: list[tuple[str, Any]], required: tuple[str, ...], learned: list[str]
) -> type[msgspec.Struct]:
    """A struct with the known fields (absent: UNSET), then the learned ones of any type."""
    fields: list[Any] = []
    for key, kind in known:
        if key in required:
            fields.append((key, kind))
        else:
            fields.append((key, kind | None | UnsetType, UNSET))
    fields += [(f"extra{i}", Any, UNSET) for i in range(len(learned))]
    fields.append((REST, dict[str, Any] | UnsetType, UNSET))
    rename = {f"extra{i}": key for i, key in enumerate(learned)} | {REST: RESERVED}
    return msgspec.defstruct(name, fields, rename=rename, forbid_unknown_fields=True, gc=False)


def _can_be_field(key: str) -> bool:
    """Whether msgspec takes the key as a field's name."""
    return not any(char in '\\"' or char < " " or "\ud800" <= char <= "\udfff" for char in key)
