"""Mutated RL files: rows equal to an independent parser's, or an error with a byte offset.

Never a traceback, a hang, or a silent loss: where the oracle accepts a file, lever must give it
back whole; where it refuses, lever must refuse.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter

import pytest

from lever_data.errors import LeverError
from lever_data.sources.fields import Context
from lever_data.sources.rl import RlFormat
from tests.legacy_oracle import RefuseError, expect
from tests.legacy_strategies import Json, difference
from tests.test_ingest_blocks import read
from tests.torture.conftest import Report

CANDIDATE = {"pointer": [3, 1], "gen_method": "beam", "beam_score": 0.25, "vqa_correct": 1}
SEEDS: list[Json] = [
    {"0": {"pointer_candidates": [CANDIDATE, {"pointer": [1]}]}, "1": {"pointer_candidates": []}},
    {str(i): {"pointer_candidates": [CANDIDATE]} for i in range(6)},
    {
        "_meta": {"vqa_model": "m", "deep": [[[{}]]]},
        "4": {
            "query": {"query_id": 4, "question": 'Why\n"so"?', "gt_answers_raw": ["é", "\\"]},
            "candidate_pool_indices": [9, 8],
            "pointer_candidates": [
                {
                    "pointer": [9, 8],
                    "pointer_pos": [0, 1],
                    "vqa_eval_mode": "vqaEval",
                    "x": {"y": 1},
                }
            ],
        },
        "12": {"pointer_candidates": [{"pointer": [9], "note": '}, "5": {', "eval_failed": False}]},
    },
]
TOKENS = [
    *(bytes([code]) for code in b'{}[],:"\\ \n\0\xff'),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0", b"1.", b"1.0", b"\\u"),
    *(b"\\ud800", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"9" * 25, b"9" * 4400, b"[" * 3000),
    *(b'"pointer"', b'"pointer_pos": [0]', b'"_lever": 1', b'"vqa_correct": 2', b'}, "7": {'),
    *(b'"vqa_eval_mode": "file"', b'"0": {"pointer_candidates": []}', b'"beam_score": 12'),
]
POSITION = re.compile(r"byte (\d+)")


def mutate(rng: random.Random, text: bytes) -> bytes:
    """One to four small changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice([0, 1, 1, 2, 5, 30]))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(TOKENS) + text[at:]
        elif kind == 1:
            text = text[:at] + rng.choice(TOKENS) + text[end:]
        elif kind == 2:
            text = text[:at] + text[end:]
        elif kind == 3:
            there = rng.randrange(len(text) + 1)
            text = text[:there] + text[at:end] + text[there:]
        elif kind == 4:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        else:
            text = text[:at] if rng.random() < 0.3 else text[:at] + text[at : end + 1] + text[at:]
    return text


def check(text: bytes, block: int) -> str:
    """``same`` or ``refused``; an AssertionError where lever and the oracle disagree."""
    try:
        wanted = expect(text)
    except RefuseError:
        with pytest.raises(LeverError) as found:
            read(text, RlFormat(Context("d", "s", None)), block, restart=True)
        position = POSITION.search(str(found.value.where))
        assert position is not None, found.value
        assert int(position.group(1)) <= len(text)
        return "refused"
    back, _ = read(text, RlFormat(Context("d", "s", None)), block, restart=True)
    assert difference(back, wanted) is None
    return "same"


def fuzz(seed: int, count: int) -> Counter[str]:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        indent = rng.choice([None, None, 1])
        text = json.dumps(rng.choice(SEEDS), indent=indent, ensure_ascii=rng.random() < 0.5)
        mutated = mutate(rng, text.encode())
        try:
            outcomes[check(mutated, rng.choice([1 << 20, 40, 150]))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, input {number}: {mutated!r}")
            raise
    return outcomes


@pytest.mark.slow
def test_mutated_files_are_read_right_or_refused_with_a_position(report: Report) -> None:
    outcomes = fuzz(0, 600)
    report(str(dict(outcomes)))
    assert outcomes["same"] > 60
    assert outcomes["refused"] > 200


@pytest.mark.long
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_mutated_files(report: Report) -> None:
    seed = int(os.environ.get("LEVER_FUZZ_SEED", "1"))
    outcomes = fuzz(seed, 120_000)
    report(f"seed {seed}: {dict(outcomes)}")
    assert outcomes.total() == 120_000
