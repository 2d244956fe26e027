"""Results files of evaluation servers: predictions that are ingested, scored and compared."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import LeverError
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task
from lever_data.relations.db import connect
from lever_data.report.diff import diff
from lever_data.report.options import DiffRequest
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Run, Store
from tests.test_belong import write_questions

RIGHT = [{"question_id": 100, "answer": "bbb"}, {"question_id": 900, "answer": "AAA."}]
WRONG = [{"question_id": 100, "answer": "bbb"}, {"question_id": 900, "answer": "bbb"}]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "s")
    options = IngestOptions(dataset="d", split="val")
    assert list(ingest(write_questions(tmp_path), made, options))
    return made


def put(store: Store, path: Path, content: Any, **options: Any) -> tuple[Run, list[str]]:
    said: list[str] = []
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    given = IngestOptions(dataset="d", split="val", notice=said.append, **options)
    (done,) = ingest([path], store, given)
    return done.run, said


@pytest.mark.slow
def test_predictions_are_scored_by_what_was_ingested(store: Store, tmp_path: Path) -> None:
    run, said = put(store, tmp_path / "mine.json", RIGHT)
    assert (run.kind, run.details["accuracy"]) == ("evaluation", 1.0)
    assert run.parents == (store.runs()[0].run,)
    assert any("10 of 12 questions have no prediction" in line for line in said)
    sql = (
        "select selector, shots, query_id, prediction, accuracy from evaluations order by query_id"
    )
    assert connect(store).execute(sql).fetchall() == [
        ("mine", 0, 0, "AAA.", 1.0),
        ("mine", 0, 1, "bbb", 1.0),
    ]


@pytest.mark.slow
def test_every_form_holds_the_same_predictions(store: Store, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in RIGHT)
    gqa = [{"questionId": str(r["question_id"]), "prediction": r["answer"]} for r in RIGHT]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("results.json", json.dumps(RIGHT))
    runs = [
        put(store, tmp_path / name, content, name="mine")[0]
        for name, content in [("a.json", RIGHT), ("b.jsonl", lines), ("c.json", gqa)]
    ]
    runs.append(put(store, tmp_path / "z.zip", None, name="mine")[0])
    assert len({tuple(run.files.values()) for run in runs}) == 1


@pytest.mark.slow
def test_two_files_are_compared(store: Store, tmp_path: Path) -> None:
    a, _ = put(store, tmp_path / "a.json", RIGHT)
    b, _ = put(store, tmp_path / "b.json", WRONG)
    found = diff(store, DiffRequest(a=a.run, b=b.run))
    assert (found.pairs, found.changed, found.mean_change) == (2, 1, -0.5)


@pytest.mark.slow
def test_answers_are_normalised_as_the_task_says(tmp_path: Path) -> None:
    """As a rollout's are, whose scores they are compared with."""
    made = Store.create(tmp_path / "s")
    task = Task(name="choice", normalize="squad")
    options = IngestOptions(dataset="d", split="val", task=task)
    assert list(ingest(write_questions(tmp_path), made, options))
    run, _ = put(made, tmp_path / "mine.json", [{"question_id": 100, "answer": "The  bbb,"}])
    found = connect(made).execute("select prediction, accuracy from evaluations").fetchall()
    assert found == [("bbb", 1.0)]
    assert run.parameters["metric_version"] == Scoring(task).name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*RIGHT, {"question_id": 7, "answer": "x"}], "1 of 3 questions are not in the store"),
        ([*RIGHT, RIGHT[0]], "a question is answered twice"),
        ([{"question_id": 100, "answer": 5}], "Expected `str"),
        ([{"question_id": 100, "answer": None}], "a result needs question_id and answer"),
    ],
)
def test_what_is_wrong_with_a_file(
    store: Store, tmp_path: Path, content: list[Any], message: str
) -> None:
    with pytest.raises(LeverError, match=message):
        put(store, tmp_path / "a.json", content)
    assert [run.kind for run in store.runs()] == ["examples"]


def test_without_questions_nothing_is_scored(tmp_path: Path) -> None:
    with pytest.raises(LeverError, match="no questions to score these predictions by"):
        put(Store.create(tmp_path / "s"), tmp_path / "a.json", RIGHT)
