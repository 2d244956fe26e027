"""Make RL data files of any size: deterministic, in the look of the legacy generator.

    python benchmarks/generate.py OUT.json --megabytes 200 [--generation 1|2|3] [--flat]

Queries in order, fifteen candidates each, two shots, indented as the legacy code writes them. What
does not name its query (generations 1 and 2) comes again after 20,000 queries, so that 20 GB take
minutes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

CANDIDATES = 15
DISTINCT = 20_000  # queries, before their candidates come again
_METHODS = [("beam", None)] * 5 + [("sample", 1.0)] * 4 + [("sample", 1.3)] * 5 + [("random", None)]
_ANSWERS = ["yes", "no", "pony tail", "two", "skate board", "red and white", "café", "umbrella"]


def records(generation: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """An endless stream of (query id, value)."""
    rng = random.Random(seed)
    query_id = 0
    while True:
        yield str(query_id), _value(rng, query_id, generation)
        query_id += 1


def write(path: Path, size: int, generation: int = 2, indent: int | None = 2) -> int:
    """Write a file of about ``size`` bytes; returns the number of queries."""
    written = queries = 0
    pad = "" if indent is None else "  "
    with path.open("w", encoding="utf-8") as file:
        for key, text in _texts(generation, indent, pad):
            piece = f'{"{" if not queries else ","}\n{pad}"{key}": {text}'
            written += file.write(piece)
            queries += 1
            if written >= size:
                break
        file.write("\n}\n")
    return queries


def _texts(generation: int, indent: int | None, pad: str) -> Iterator[tuple[str, str]]:
    """An endless stream of (query id, value as JSON)."""
    made = []
    for key, value in records(generation):
        text = json.dumps(value)
        if indent is not None:  # as json.dumps would, but that is not compiled
            text = msgspec.json.format(text, indent=indent).replace("\n", f"\n{pad}")
        yield key, text
        if generation < 3:
            made.append(text)
        if len(made) == DISTINCT:
            break
    for query_id in count(DISTINCT):
        yield str(query_id), made[query_id % DISTINCT]


def _value(rng: random.Random, query_id: int, generation: int) -> dict[str, Any]:
    pool = rng.sample(range(10_000), 32)
    value: dict[str, Any] = {}
    if generation == 3:
        answers = rng.choices(_ANSWERS, k=10)
        value["query"] = {
            "query_id": query_id,
            "question_id": query_id * 10 + 5,
            "image_id": query_id * 7,
            "question": f"What is the {rng.choice(_ANSWERS)} doing in picture {query_id}?",
            "gt_answers_raw": answers,
            "gt_answers_norm": answers,
        }
        value["candidate_pool_indices"] = pool
    value["pointer_candidates"] = [
        _candidate(rng, pool, rank, generation) for rank in range(CANDIDATES)
    ]
    return value


def _candidate(rng: random.Random, pool: list[int], rank: int, generation: int) -> dict[str, Any]:
    method, temperature = _METHODS[rank]
    positions = rng.sample(range(len(pool)), 2)
    accuracy = rng.choice([0.0, 0.0, 0.0, 0.3, 0.6, 0.9, 1.0])
    record: dict[str, Any] = {
        "pointer": [pool[p] for p in positions],
        "gen_method": method,
        "beam_rank": rank if method == "beam" else None,
        "beam_score": rng.random() if method == "beam" else None,
        "logprob_score": None if method == "random" else -10 * rng.random(),
        "temperature": temperature,
        "vqa_pred_answer": rng.choice(_ANSWERS),
        "vqa_correct": int(accuracy > 0),
        "vqa_acc_score": accuracy,
    }
    if generation >= 2:
        record["vqa_eval_mode"] = "file" if rng.random() < 0.97 else "fallback"
    if generation == 3:
        record["pointer_pos"] = positions
        record["vqa_raw_generation"] = record["vqa_pred_answer"] + "\n"
        for key in ("vqa_gt_prob", "vqa_rel_token_f1", "vqa_rel_edit_sim", "vqa_rel_score"):
            record[key] = round(rng.random(), 6)
        record["eval_split_used"] = "train"
        record["eval_failed"] = False
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--generation", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--flat", action="store_true", help="no indentation")
    given = parser.parse_args()
    queries = write(
        given.out, given.megabytes * 1_000_000, given.generation, None if given.flat else 2
    )
    print(f"{queries} queries, {given.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
