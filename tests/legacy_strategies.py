"""Random legacy files of every generation, for property tests; independent of lever's reader."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# Names that provoke: lever's own columns, escapes, the boundary pattern, digits.
ODD_NAMES = st.sampled_from(
    ["note", "run", "candidate", "query_id", "extra0", "", "a b", 'q"t', "\\", "é", "7", "_x"]
)
FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, TEXT)
TRICKY = st.sampled_from(['}, "5": {"pointer_candidates": [', '"', "\\", "NaN", "\n\t", "}", "-0"])
ANYTHING = st.recursive(
    st.one_of(SCALARS, TRICKY),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, TRICKY), inner, max_size=3)
    ),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(ODD_NAMES, ANYTHING, max_size=2)
FRACTIONS = st.one_of(st.floats(0, 1), st.sampled_from([float("nan"), float("inf")]))
MODES = ["fallback", "file", "simple_match", "error"]
POINTER = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True)


def optional(draw: st.DrawFn, record: Json, key: str, values: st.SearchStrategy[Any]) -> None:
    """Leave the key out, set it to null, or to a value."""
    choice = draw(st.integers(0, 7))
    if choice > 0:
        record[key] = None if choice == 1 else draw(values)


@st.composite
def candidates(draw: st.DrawFn, generation: int, mode: str) -> Json:
    record: Json = {"pointer": draw(POINTER)}
    optional(draw, record, "gen_method", st.sampled_from(["beam", "sample", "random", "odd"]))
    optional(draw, record, "beam_rank", st.integers(0, 2**31 - 1))
    optional(draw, record, "beam_score", FLOATS)
    optional(draw, record, "logprob_score", st.floats(max_value=0) | st.just(math.nan))
    optional(draw, record, "temperature", st.floats(min_value=0) | st.just(math.nan))
    optional(draw, record, "vqa_acc_score", FRACTIONS)
    optional(draw, record, "vqa_pred_answer", st.one_of(TEXT, TRICKY))
    optional(draw, record, "vqa_correct", st.integers(0, 1))
    if generation >= 2:
        optional(draw, record, "vqa_eval_mode", st.sampled_from([mode, mode, *MODES]))
    if generation == 3:
        if draw(st.booleans()):
            positions = st.integers(0, 2**15 - 1)
            size = len(record["pointer"])
            record["pointer_pos"] = draw(st.lists(positions, min_size=size, max_size=size))
        optional(draw, record, "vqa_raw_generation", TEXT)
        for key in ("vqa_gt_prob", "vqa_rel_token_f1", "vqa_rel_edit_sim", "vqa_rel_score"):
            optional(draw, record, key, FRACTIONS)
        optional(draw, record, "eval_split_used", TEXT)
        optional(draw, record, "eval_failed", st.booleans())
        optional(draw, record, "vqa_prompt_text", TEXT)
    make_sense(record)
    return record | (draw(UNKNOWN) if draw(st.integers(0, 3)) == 0 else {})


def make_sense(record: Json) -> None:
    """Let scores not contradict each other: failed rows earn nothing, official ones are right
    exactly where their accuracy is above 0."""
    if record.get("eval_failed") or record.get("vqa_eval_mode") == "error":
        record |= {key: 0 for key in ("vqa_correct", "vqa_acc_score") if key in record}
    accuracy = record.get("vqa_acc_score")
    if record.get("vqa_correct") is not None and accuracy is not None and math.isfinite(accuracy):
        record["vqa_correct"] = int(accuracy > 0)


@st.composite
def k64_values(draw: st.DrawFn) -> Json:
    """A query of K64-fixed data: pointers are positions in the query's own pool."""
    ids = st.integers(0, 2**31 - 1)
    pool = draw(st.lists(ids, min_size=4, max_size=9, unique=True))
    candidates = []
    for positions in draw(
        st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), max_size=3)
    ):
        record: Json = {"pointer": positions, "pointer_global": [pool[p] for p in positions]}
        optional(draw, record, "vqa_correct", st.integers(0, 1))
        candidates.append(record)
    return {"candidate_pool_ids": pool, "pointer_candidates": candidates}


@st.composite
def values(draw: st.DrawFn, query_id: int, generation: int, mode: str) -> Json:
    value: Json = {}
    records = draw(st.lists(candidates(generation, mode), max_size=3))
    if generation == 3 and draw(st.integers(0, 3)):
        info: Json = {}
        if draw(st.booleans()):
            info["query_id"] = query_id
        optional(draw, info, "question_id", st.integers(-(2**63), 2**63 - 1))
        optional(draw, info, "image_id", st.integers(0, 10**7))
        optional(draw, info, "question", TEXT)
        answer = st.one_of(
            TEXT, st.fixed_dictionaries({"answer": TEXT, "answer_id": st.integers(1, 10)})
        )
        optional(draw, info, "gt_answers_raw", st.lists(answer, max_size=3))
        optional(draw, info, "gt_answers_norm", st.lists(TEXT, max_size=3))
        unknown = draw(UNKNOWN)
        unknown.pop("query_id", None)
        value["query"] = None if draw(st.integers(0, 9)) == 0 else info | unknown
    if generation == 3:
        others = draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))
        named = [example for record in records for example in record["pointer"]]
        pool = draw(st.permutations(list(dict.fromkeys([*others, *named]))))
        optional(draw, value, "candidate_pool_indices", st.just(pool))
        for record in records if value.get("candidate_pool_indices") else []:
            if record.get("pointer_pos") is not None:
                record["pointer_pos"] = [pool.index(example) for example in record["pointer"]]
    value["pointer_candidates"] = records
    return value | (draw(UNKNOWN) if draw(st.integers(0, 3)) == 0 else {})


@st.composite
def rl_files(draw: st.DrawFn) -> Json:
    """RL data of one generation, queries in any order, with members that are no queries."""
    generation = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["file", "vqaEval"]))
    ids = draw(
        st.lists(
            st.one_of(st.integers(0, 30), st.integers(0, 2**63 - 1)),
            min_size=1,
            max_size=5,
            unique=True,
        )
    )
    file: Json = {}
    if generation == 3 and draw(st.booleans()):
        file["_meta"] = {"vqa_model": draw(TEXT), "args": draw(ANYTHING)}
    is_k64 = draw(st.integers(0, 5)) == 0
    for query_id in ids:
        one = k64_values() if is_k64 else values(query_id, generation, mode)
        file[str(query_id)] = draw(one)
    if draw(st.integers(0, 4)) == 0:
        file["_note"] = draw(ANYTHING)
    return file


@st.composite
def beam_files(draw: st.DrawFn) -> Json:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True))
    file: Json = {}
    for query_id in ids:
        beams = [[*pointer, query_id] for pointer in draw(st.lists(POINTER, max_size=3))]
        size = len(beams)
        scores = draw(st.lists(FLOATS, min_size=size, max_size=size))
        file[str(query_id)] = {"id_list": beams, "score_list": scores} | draw(UNKNOWN)
    return file


@st.composite
def texts(draw: st.DrawFn, files: st.SearchStrategy[Json]) -> tuple[Json, bytes]:
    """A file and one way to write it: indentation, escapes, a byte order mark, white space."""
    file = draw(files)
    indent = draw(st.sampled_from([None, 0, 2]))
    text = json.dumps(file, indent=indent, ensure_ascii=draw(st.booleans()))
    before, after = draw(st.sampled_from(["", "\ufeff"])), draw(st.sampled_from(["", "\n", " \n"]))
    return file, (before + text + after).encode()


def null_non_finite(value: Any) -> Any:
    """What a file should come back as: NaN and infinite numbers are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [null_non_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: null_non_finite(item) for key, item in value.items()}
    return value


def difference(left: Any, right: Any, at: str = "$") -> str | None:
    """The first difference, exact: true is not 1. ``None`` where there is none."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{at}: keys {left.keys() ^ right.keys()}"
        pairs = [(left[key], right[key], f"{at}.{key}") for key in left]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(a, b, f"{at}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True))]
    elif left == right and isinstance(left, bool) == isinstance(right, bool):
        return None
    else:
        return f"{at}: {left!r} is not {right!r}"
    return next((found for pair in pairs if (found := difference(*pair))), None)
