"""What the tests of `lever audit` share: a small store, and the keys that every audit has."""

from __future__ import annotations

from typing import Any

from tests.stores import candidate

KEYS = {
    "view", "reward_mode", "queries", "candidates", "classes", "fallback_share", "unknown_share",
    "failed_share", "by_gen_method", "oracle_gap",
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Two queries: one mixed, one all wrong; fallback, unknown and failed rows among them."""
    good = {"eval_mode": "file", "correct": 1, "score": 1.0}
    bad = {"eval_mode": "file", "correct": 0, "score": 0.0}
    return [
        candidate(0, 0, [1, 2], **bad, beam_rank=0, logprob_score=-1.0),
        candidate(0, 1, [3, 4], **good, gen_method="sample", temperature=1.0, logprob_score=-2.0),
        candidate(0, 2, [5, 6], eval_failed=True, eval_mode="fallback"),
        candidate(1, 0, [2, 5], **{**bad, "eval_mode": "fallback"}),
        candidate(1, 1, [3, 4], eval_mode=None, expected_score=0.5),
    ]
