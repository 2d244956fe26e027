"""What a file of RL data must come back as, or that it must be refused: written apart from lever.

The standard parser and plain rules of LEGACY.md; slow, short, and sharing no code with the reader.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

Json = dict[str, Any]

FRACTIONS = [
    "vqa_acc_score",
    "vqa_gt_prob",
    "vqa_rel_token_f1",
    "vqa_rel_edit_sim",
    "vqa_rel_score",
]
FLOATS = ["beam_score", "logprob_score", "temperature", "info_score", *FRACTIONS]
INTEGERS = ["pointer", "pointer_pos", "beam_rank", "vqa_correct"]
TEXTS = ["gen_method", "vqa_pred_answer", "vqa_raw_generation", "eval_split_used", "error"]
TEXTS += ["scorer", "metric_version", "policy"]


MODES = ["file", "vqaEval", "fallback", "simple_match", "error"]


class RefuseError(Exception):
    """The file is wrong."""


def expect(text: bytes) -> Json:
    """The file as it must come back; RefuseError where lever must refuse it."""
    try:
        file = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_float=lambda number: _finite(float(number)),
            parse_constant=lambda _: None,
        )
        json.dumps(file, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad UTF-8 and lone surrogates are ValueErrors
        raise RefuseError(str(error)) from None
    _demand(isinstance(file, dict))
    result = {}
    for key, value in file.items():
        if not key.startswith("_"):
            _demand(re.fullmatch(r"0|[1-9][0-9]{0,18}", key) is not None and int(key) < 2**63)
            value = _query(int(key), value)
        result[key] = _finite(value)
    return result


def _object(pairs: list[tuple[str, Any]]) -> Json:
    _demand(len({key for key, _ in pairs}) == len(pairs))
    return dict(pairs)


def _query(query_id: int, value: Any) -> Json:
    _demand(isinstance(value, dict) and "_lever" not in value and "pointer_candidates" in value)
    pool = value.get("candidate_pool_indices")
    _demand(
        pool is None or (isinstance(pool, list) and all(_is_int(p, 0, 2**31 - 1) for p in pool))
    )
    _demand(pool is None or len(set(pool)) == len(pool))
    if value.get("query") is not None:
        info = value["query"]
        _demand(isinstance(info, dict) and "_lever" not in info)
        _demand(info.get("query_id", query_id) == query_id)
        _demand(_is_int(info.get("query_id", 0), -(2**63), 2**63 - 1))
        for key in ("question_id", "image_id"):
            _demand(info.get(key) is None or _is_int(info[key], -(2**63), 2**63 - 1))
        _demand(info.get("question") is None or isinstance(info["question"], str))
        answers = info.get("gt_answers_raw")
        _demand(answers is None or isinstance(answers, list))
        for answer in answers or []:
            text = answer.get("answer") if isinstance(answer, dict) else answer
            _demand(isinstance(text, str))
    _demand(isinstance(value["pointer_candidates"], list))
    found = [_candidate(c) for c in value["pointer_candidates"]]
    for one in found if pool is not None else []:
        _demand(set(one["pointer"]) <= set(pool))
        if one.get("pointer_pos") is not None:
            _demand([dict(enumerate(pool)).get(p) for p in one["pointer_pos"]] == one["pointer"])
    return {**value, "pointer_candidates": found}


def _candidate(record: Any) -> Json:
    _demand(isinstance(record, dict) and "pointer" in record and "_lever" not in record)
    record = {**record, **{key: _whole(record[key]) for key in INTEGERS if key in record}}
    if isinstance(record.get("vqa_correct"), bool):
        record["vqa_correct"] = int(record["vqa_correct"])
    pointer, position = record["pointer"], record.get("pointer_pos")
    _demand(isinstance(pointer, list) and len(pointer) <= 127)
    _demand(all(_is_int(p, 0, 2**31 - 1) for p in pointer) and len(set(pointer)) == len(pointer))
    if position is not None:
        _demand(isinstance(position, list) and len(position) == len(pointer))
        _demand(all(_is_int(p, 0, 2**15 - 1) for p in position))
    found = dict(record)
    for key in FLOATS:
        number = record.get(key)
        _demand(
            number is None or (isinstance(number, int | float) and not isinstance(number, bool))
        )
        if isinstance(number, int):
            _demand(abs(number) < 1 << 1024 and math.isfinite(_float(number)))
            found[key] = _float(number)
    _demand(all(found.get(key) is None or 0 <= found[key] <= 1 for key in FRACTIONS))
    _demand(found.get("temperature") is None or found["temperature"] >= 0)
    _demand(found.get("logprob_score") is None or found["logprob_score"] <= 1e-4)
    for key in TEXTS:
        _demand(record.get(key) is None or isinstance(record[key], str))
    _demand(record.get("beam_rank") is None or _is_int(record["beam_rank"], 0, 2**31 - 1))
    _demand(record.get("vqa_correct") is None or _is_int(record["vqa_correct"], 0, 1))
    _demand(record.get("vqa_eval_mode") in (None, *MODES))
    _demand(record.get("eval_failed") is None or isinstance(record["eval_failed"], bool))
    _demand(record.get("shot_scores") is None)  # the corpus has none
    _demand(_makes_sense(found))
    return found


def _makes_sense(record: Json) -> bool:
    correct: Any = record.get("vqa_correct")
    accuracy: Any = record.get("vqa_acc_score")
    if record.get("eval_failed") or record.get("vqa_eval_mode") == "error":
        return correct != 1 and not accuracy
    if record.get("vqa_eval_mode") not in ("file", "vqaEval") or None in (correct, accuracy):
        return True
    return bool((correct == 1) == (accuracy > 0))


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value == int(value) else value


def _float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _demand(condition: bool) -> None:
    if not condition:
        raise RefuseError
