"""A store for the tests of `lever board`: runs of every kind, and texts that no page may take for
more than text.
"""

from __future__ import annotations

import json
from pathlib import Path

from lever_data.store.schema import EVALUATIONS, SWEEPS
from lever_data.store.store import Run, RunSpec, Store
from lever_train.evaluate.scores import PairTest, Row, Scoreboard
from lever_train.learn.log import Log
from tests.stores import candidate, commit, commit_examples, new_store, table

EVIL = "<script>alert(1)</script> \"'\u202e</td>"


def board_store(path: Path) -> Store:
    """Candidates of 12 queries, three evaluations and their sweep, two trainings."""
    store = new_store(path)
    rows = [
        candidate(
            query, ordinal, [ordinal, ordinal + 9],
            beam_rank=ordinal,
            logprob_score=-1.0 - ordinal,
            eval_mode="fallback" if (query, ordinal) == (3, 1) else "file",
            eval_failed=(query, ordinal) == (2, 5),
            error=EVIL if (query, ordinal) == (2, 5) else None,
            answer=EVIL,
            generation=EVIL + ", Question: " + "x" * 1_000_000 * (query == 1),
            correct=int((query * ordinal) % 4 == 1),
            score=0.6 * ((query * ordinal) % 4 == 1),
            scorer="a model",
            shot_scores=[{"shot": 1, "score": 0.25, "answer": EVIL}],
        )
        for query in range(12)
        for ordinal in range(6)
    ]  # fmt: skip
    commit(store, rows)
    questions = [
        {"dataset": "d", "split": "train", "example_id": n, "question_id": n, "image_id": n,
         "question": f"{EVIL} number {n}", "answers": [EVIL] * 3, "answer": EVIL}
        for n in range(20)
    ]  # fmt: skip
    commit_examples(store, questions)
    cells = [_evaluation(store, cell) for cell in (1, 2, 3)]
    _sweep(store, [run.run for run in cells])
    for name in ("first", "second"):
        _training(store, name)
    return store


def selectors(cell: int) -> dict[str, list[float]]:
    """What three selectors earn on each query of an evaluation."""
    return {
        "random": [0.3 * (q % 2) for q in range(12)],
        "oracle": [1.0] * 12,
        "cell": [float((q * cell) % 3 == 1) for q in range(12)],
    }


def _evaluation(store: Store, cell: int) -> Run:
    """Three selectors at one shot, as `lever eval` commits them; the scoreboard is theirs."""
    named = selectors(cell)
    key = {"dataset": "d", "split": "train", "shots": 1, "scorer": "s", "metric": "1"}
    rows = [
        {**key, "query_id": q, "selector": name, "pointer": [q], "prediction": EVIL,
         "accuracy": scores[q], "correct": int(scores[q] > 0)}
        for q in range(12)
        for name, scores in named.items()
    ]  # fmt: skip
    board = Scoreboard(
        tuple(Row(n, 1, sum(s) / 12, 0.1, 0.9, 12, 0) for n, s in named.items()),
        (PairTest("cell", "random", 1, 0.1, -0.05, 0.25, 0.2, 4, 2, 0.5, 12),),
    )
    details = {"scoreboard": board.to_json()}
    spec = RunSpec("evaluation", "d", "train", parameters={"answerer": "s", "cell": cell})
    with store.begin(spec) as writer:
        writer.write("evaluations", table(EVALUATIONS, rows))
        return writer.commit(details=details)


def _sweep(store: Store, evaluations: list[str]) -> Run:
    rows = [
        {"sweep": "grid", "cell": f"c{n}", "settings": json.dumps({"run.seed": n, "x": EVIL}),
         "accuracy": sum(selectors(n)["cell"]) / 12, "low": 0.1, "high": 0.9,
         "num_queries": 12, "evaluation": run, "checkpoint": "c.pt"}
        for n, run in enumerate(evaluations, 1)
    ]  # fmt: skip
    with store.begin(RunSpec("sweep", "d", "train")) as writer:
        writer.write("sweeps", table(SWEEPS, rows))
        return writer.commit()


def _training(store: Store, name: str) -> Run:
    log = Log()
    for step in range(4):
        log.step("rce", 1, step, {"loss": 9.0 - step - (name == "second")})
    log.epoch("rce", 1, {"val_loss": 2.0})
    spec = RunSpec("training", "d", "train", {"path": f"/x/{name}"}, source_sha256=name)
    with store.begin(spec) as writer:
        writer.write("training_metrics", log.table())
        return writer.commit()
