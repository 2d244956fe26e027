"""`lever rescore`: official scores from stored answers, as a run with the old one as parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task
from lever_data.items.vqa_metric import METRIC_VERSION
from lever_data.relations.db import open_session
from lever_data.report.options import RescoreRequest
from lever_data.report.rescore import Change, rescore
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Run, Store
from tests.commands import lever
from tests.shared_data import OKVQA, needs_shared
from tests.stores import candidate, commit, commit_examples, new_store

SCORES = ("eval_mode", "metric", "correct", "score")
SIMILAR = ("token_f1", "edit_sim", "similarity")


def write_official(folder: Path, answers: dict[int, list[str]], subtype: str = "train2014") -> None:
    """Questions 100, 101, … in order, with these answers."""
    head = {"data_subtype": subtype}
    questions = [{"question_id": i, "image_id": i, "question": "?"} for i in range(100, 104)]
    notes = [
        {"question_id": i, "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(known)]}
        for i, known in answers.items()
    ]
    (folder / "q.json").write_text(json.dumps({**head, "questions": questions}))
    (folder / "a.json").write_text(json.dumps({**head, "annotations": notes}))


def request(folder: Path, run: Run | str, **options: Any) -> RescoreRequest:
    name = run if isinstance(run, str) else run.run
    return RescoreRequest(
        run=name, questions=folder / "q.json", annotations=folder / "a.json", **options
    )


def rows_of(run: Run) -> list[dict[str, Any]]:
    (path,) = run.table_files("candidates")
    return cast(list[dict[str, Any]], pq.read_table(path, partitioning=None).to_pylist())


def old_row(query: int, ordinal: int, answer: str | None, **columns: Any) -> dict[str, Any]:
    columns = {"eval_mode": "fallback", "correct": 1, "score": 0.5, **columns}
    return candidate(query, ordinal, [8, 9], answer=answer, extra='{"k": 1}', **columns)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write_official(tmp_path, {100: ["red car"] * 4 + ["blue"] * 6, 101: ["two"] * 10})
    return new_store(tmp_path)


def test_fallback_rows_become_official_rows(store: Store, tmp_path: Path) -> None:
    run = commit(
        store,
        [
            old_row(0, 0, "a red car."),
            old_row(0, 1, "red"),
            old_row(1, 0, "2", score=1.0),
            old_row(1, 1, "", eval_mode="file", correct=0, score=0.0),
        ],
    )
    done = rescore(store, request(tmp_path, run))
    assert done.is_new
    assert done.run.kind == "rescore"
    assert done.run.parents == (run.run,)
    new, old = rows_of(done.run), rows_of(run)
    assert [[row[c] for c in SCORES] for row in new] == [
        ["file", METRIC_VERSION, 1, 1.0],
        ["file", METRIC_VERSION, 0, 0.0],
        ["file", METRIC_VERSION, 1, 1.0],
        ["file", METRIC_VERSION, 0, 0.0],
    ]
    assert [[row[c] for c in SIMILAR] for row in new] == [
        [1.0, 1.0, 1.0],
        [pytest.approx(2 / 3), 0.6, pytest.approx(2 / 3)],
        [1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0],
    ]
    same = [name for name in new[0] if name not in (*SCORES, *SIMILAR)]
    assert [[row[c] for c in same] for row in new] == [[row[c] for c in same] for row in old]
    assert done.num_fallback_before == 3
    assert done.changes == (
        Change(0, 0, "a red car.", "fallback", 0.5, 1.0),
        Change(0, 1, "red", "fallback", 0.5, 0.0),
    )


def test_twice_is_once(store: Store, tmp_path: Path) -> None:
    run = commit(store, [old_row(0, 0, "blue")])
    first, again = (rescore(store, request(tmp_path, run)) for _ in range(2))
    assert (first.is_new, again.is_new) == (True, False)
    assert first.run == again.run
    assert first.changes == again.changes
    assert len(store.runs()) == 2


@pytest.mark.slow
def test_the_new_run_counts_in_the_views(store: Store, tmp_path: Path) -> None:
    rescore(store, request(tmp_path, commit(store, [old_row(0, 0, "blue"), old_row(1, 0, "x")])))
    con = open_session(store, only=["all_candidates"]).con
    found = con.execute("select eval_mode, score from all_candidates order by query_id")
    assert found.fetchall() == [("file", 1.0), ("file", 0.0)]


def test_failures_stay_unless_only_the_scoring_failed(store: Store, tmp_path: Path) -> None:
    failed = {"eval_failed": True, "correct": 0, "score": 0.0}
    run = commit(
        store,
        [
            old_row(0, 0, "blue", **failed),
            old_row(0, 1, "", **failed),
            old_row(0, 2, "blue", error="the server is down", **failed),
            old_row(0, 3, None, eval_failed=None),
        ],
    )
    done = rescore(store, request(tmp_path, run))
    assert [(r["eval_failed"], r["eval_mode"], r["score"]) for r in rows_of(done.run)] == [
        (False, "file", 1.0),
        (True, "fallback", 0.0),
        (True, "fallback", 0.0),
        (None, "fallback", 0.5),
    ]
    assert (done.num_healed, done.num_unanswered, done.num_missing) == (1, 3, 0)


def test_a_query_without_annotation(store: Store, tmp_path: Path) -> None:
    run = commit(store, [old_row(0, 0, "blue"), old_row(3, 0, "blue")])
    with pytest.raises(LeverError, match="no annotation") as caught:
        rescore(store, request(tmp_path, run))
    assert caught.value.value == {"query_id": 3, "question_id": 103}
    assert "--allow-missing" in str(caught.value.hint)
    assert [r.kind for r in store.runs()] == ["rl_data"]
    done = rescore(store, request(tmp_path, run, allow_missing=True))
    assert done.num_missing == 1
    assert [row["eval_mode"] for row in rows_of(done.run)] == ["file", "fallback"]


def test_files_of_another_split_are_refused(store: Store, tmp_path: Path) -> None:
    run = commit(store, [old_row(0, 0, "blue")])
    write_official(tmp_path, {100: ["blue"] * 10}, "val2014")
    with pytest.raises(LeverError, match="of the split val, the run of train"):
        rescore(store, request(tmp_path, run))


def test_only_candidates_have_answers(store: Store, tmp_path: Path) -> None:
    item = {"dataset": "d", "split": "train", "example_id": 0, "question_id": 1, "question": "?"}
    run = commit_examples(store, [item])
    with pytest.raises(UsageError, match="kind examples"):
        rescore(store, request(tmp_path, run))


def test_the_command(store: Store, tmp_path: Path) -> None:
    run = commit(store, [old_row(0, 0, "red"), old_row(1, 0, "2", eval_mode=None)])
    files = ["--questions", tmp_path / "q.json", "--annotations", tmp_path / "a.json"]
    words = ["rescore", "--store", store.path, "--run", run.run, *files]
    shown = lever(*words)
    assert ["of", "unknown", "mode", "before", "1"] in [
        line.split() for line in shown.stdout.splitlines()
    ]
    assert "rescored as rescore-d-train-" in shown.stderr
    found = json.loads(lever(*words, "--json", "-").stdout)
    assert found["num_unknown_before"] == 1
    assert [tuple(change.values()) for change in found["changes"]] == [
        (0, 0, "red", "fallback", 0.5, 0.0),
        (1, 0, "2", "unknown", 0.5, 1.0),
    ]


def ingest_split(folder: Path, answers: dict[int, list[str]], first: int = 100) -> Store:
    """The questions 100 to 103 as examples of ``d``/``train``, from ``first`` on."""
    write_official(folder, answers)
    asked = json.loads((folder / "q.json").read_text())
    asked["questions"] = [q for q in asked["questions"] if q["question_id"] >= first]
    (folder / "stored.json").write_text(json.dumps(asked))
    noted = json.loads((folder / "a.json").read_text())
    noted["annotations"] = [n for n in noted["annotations"] if n["question_id"] >= first]
    (folder / "noted.json").write_text(json.dumps(noted))
    store = Store.create(folder / "store")
    files = [folder / "stored.json", folder / "noted.json"]
    assert list(ingest(files, store, IngestOptions(dataset="d", split="train")))
    return store


WORDS = {100: ["z"] * 10, 101: ["red"] * 10, 102: ["dog"] * 10, 103: ["cup"] * 10}


def test_what_was_ingested_is_official(tmp_path: Path) -> None:
    store = ingest_split(tmp_path, WORDS)
    run = commit(store, [old_row(1, 0, "red"), old_row(2, 0, "cat")])
    done = rescore(store, RescoreRequest(run=run.run))
    assert [row["score"] for row in rows_of(done.run)] == [1.0, 0.0]
    assert done.run.parents == (run.run, store.runs()[0].run)


def test_nothing_to_score_by_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, [old_row(1, 0, "red")])
    with pytest.raises(UsageError, match="has no annotations of this split"):
        rescore(store, RescoreRequest(run=run.run))
    with pytest.raises(UsageError, match="--questions and --annotations go together"):
        rescore(store, RescoreRequest(run=run.run, questions=tmp_path / "q.json"))


def test_files_are_matched_by_the_stored_question_ids(tmp_path: Path) -> None:
    """The store holds questions 101 to 103, the files one more in front of them."""
    store = ingest_split(tmp_path, WORDS, first=101)
    run = commit(store, [old_row(n, 0, a) for n, a in enumerate(["red", "dog", "cup"])])
    done = rescore(store, request(tmp_path, run))
    assert [row["score"] for row in rows_of(done.run)] == [1.0, 1.0, 1.0]
    write_official(tmp_path, {100: ["z"] * 10, 101: ["red"] * 10})
    with pytest.raises(LeverError, match="no annotation") as caught:
        rescore(store, request(tmp_path, run))
    assert caught.value.value == {"query_id": 1, "question_id": 102}


def test_a_question_of_its_own_counts_whatever_its_number(tmp_path: Path) -> None:
    """RL data that names its questions is scored by them: here the other way round."""
    write_official(tmp_path, WORDS)
    file = {
        str(n): {
            "query": {"question_id": 103 - n, "question": "?"},
            "pointer_candidates": [{"pointer": [n + 1], "vqa_pred_answer": said}],
        }
        for n, said in enumerate(["cup", "dog", "red"])
    }
    (tmp_path / "rl.json").write_text(json.dumps(file))
    store = Store.create(tmp_path / "store")
    (made,) = ingest([tmp_path / "rl.json"], store, IngestOptions(dataset="d", split="train"))
    done = rescore(store, request(tmp_path, made.run))
    assert [row["score"] for row in rows_of(done.run)] == [1.0, 1.0, 1.0]


def test_question_0_is_a_question(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for name, items in (("questions", [{"question": "?"}]), ("annotations", [{"answers": ["x"]}])):
        file = {name: [{"question_id": 0, **items[0]}]}
        (tmp_path / f"{name[0]}.json").write_text(json.dumps(file))
    done = rescore(store, request(tmp_path, commit(store, [old_row(0, 0, "y")])))
    assert [row["eval_mode"] for row in rows_of(done.run)] == ["file"]


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    """No ids tell, but what the run calls right is nowhere among the annotators' answers."""
    questions = [{"question_id": i, "question": "?"} for i in range(12)]
    notes = [{"question_id": i, "answers": [{"answer": chr(97 + i) * 3}] * 10} for i in range(12)]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": notes}))
    store = new_store(tmp_path)
    rows = [old_row(i, 0, chr(108 - i) * 3, eval_mode="file") for i in range(12)]
    run = commit(store, rows)
    with pytest.raises(LeverError, match="of 12 answers that the RL data calls right, 0 are") as e:
        rescore(store, request(tmp_path, run))
    assert "--order question_id" in str(e.value.hint)
    assert [r.run for r in store.runs()] == [run.run]


def prefix(shot: int, said: str | None, score: float) -> dict[str, Any]:
    return {
        "shot": shot,
        "correct": 1,
        "score": score,
        "expected_score": 0.25,
        "answer": said,
        "eval_mode": "fallback",
    }


def test_every_prefix_is_rescored_or_the_row_stays(store: Store, tmp_path: Path) -> None:
    shots = [prefix(1, "two", 0.5), prefix(2, "blue", 0.5)]
    run = commit(
        store,
        [
            old_row(0, 0, "blue", shot_scores=shots),
            old_row(0, 1, "blue", shot_scores=[prefix(1, None, 0.5), shots[1]]),
            old_row(1, 0, "two"),
        ],
    )
    done = rescore(store, request(tmp_path, run))
    new = rows_of(done.run)
    assert [(one["score"], one["correct"]) for one in new[0]["shot_scores"]] == [
        (0.0, 0),
        (1.0, 1),
    ]
    assert {one["eval_mode"] for one in new[0]["shot_scores"]} == {"file"}
    assert [one["expected_score"] for one in new[0]["shot_scores"]] == [0.25, 0.25]
    assert new[1] == rows_of(run)[1]  # nothing of it is rescored
    assert [row["eval_mode"] for row in new] == ["file", "fallback", "file"]
    assert (done.num_partial, done.num_missing) == (1, 0)


CUT_OTHERWISE = Task(cut_at=("!",))


def said_row(query: int, ordinal: int, text: str | None, answer: str, **columns: Any) -> Any:
    return old_row(query, ordinal, answer, generation=text, scorer="m", **columns)


def test_answers_are_read_anew_from_the_stored_texts(store: Store, tmp_path: Path) -> None:
    """`--cut-at` needs no model: the text that an answer was cut from is stored."""
    rows = [said_row(0, 0, "blue! Or red", "blue! Or red"), said_row(1, 0, "two", "two")]
    run = commit(store, rows)
    done = rescore(store, request(tmp_path, run, cut_at=("!",)))
    new = rows_of(done.run)
    assert [(r["answer"], r["score"]) for r in new] == [("blue", 1), ("two", 1)]
    assert {r["generation"] for r in new} == {"blue! Or red", "two"}
    scoring = Scoring(CUT_OTHERWISE)
    assert {(r["metric"], r["scorer"]) for r in new} == {(scoring.name, scoring.scorer("m"))}
    # back to how the task reads them: nothing was lost
    back = rescore(store, request(tmp_path, done.run))
    assert [r["answer"] for r in rows_of(back.run)] == ["blue! Or red", "two"]
    assert {r["scorer"] for r in rows_of(back.run)} == {"m"}


def test_an_answer_without_its_text_is_not_read_anew(store: Store, tmp_path: Path) -> None:
    shots = [prefix(1, "blue", 0.5)]
    rows = [
        said_row(0, 0, None, "blue! Or red"),
        said_row(0, 1, "blue", "blue", shot_scores=shots),
        said_row(1, 0, "two! 2", "two! 2"),
    ]
    run = commit(store, rows)
    with pytest.raises(LeverError, match="the text it is of is not stored") as caught:
        rescore(store, request(tmp_path, run, cut_at=("!",)))
    assert caught.value.value == {"query_id": 0, "candidate": 0}
    assert [r.run for r in store.runs()] == [run.run]
    done = rescore(store, request(tmp_path, run, cut_at=("!",), allow_missing=True))
    assert (done.num_unread, done.num_partial, done.num_missing) == (1, 1, 0)
    assert rows_of(done.run)[:2] == rows_of(run)[:2]
    assert [c.prediction for c in done.changes] == ["two"]


def test_answers_of_one_reading_are_not_scored_as_of_another(store: Store, tmp_path: Path) -> None:
    """A run that was asked with another `cut_at` than the task has."""
    name = Scoring(CUT_OTHERWISE).name
    run = commit(store, [said_row(0, 0, "blue, red!", "blue, red", metric=name)])
    done = rescore(store, request(tmp_path, run))
    assert [r["answer"] for r in rows_of(done.run)] == ["blue"]


@pytest.mark.long
@needs_shared
def test_okvqa(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    source = OKVQA / "rl_data_TextSimSampler_NearestDemo.json.gz"
    for _ in ingest([source], store, IngestOptions(dataset="okvqa", split="train")):
        pass
    (run,) = store.runs()
    questions = OKVQA / "OpenEnded_mscoco_train2014_questions.json.gz"
    annotations = OKVQA / "mscoco_train2014_annotations.json.gz"
    done = rescore(store, RescoreRequest(run=run.run, questions=questions, annotations=annotations))
    assert (done.num_rows, done.num_fallback_before, len(done.changes)) == (88_827, 2_643, 196)
    con = open_session(store, only=["stg_candidates"]).con
    modes = "select distinct eval_mode from stg_candidates where run = ?"
    assert con.execute(modes, [done.run.run]).fetchall() == [("file",)]
    both = """
        select count(*), count(*) filter (old.score <> new.score)
        from (select * from stg_candidates where run = ? and eval_mode = 'file') as old
        join (select * from stg_candidates where run = ?) as new using (query_id, candidate)
    """
    assert con.execute(both, [run.run, done.run.run]).fetchall() == [(86_184, 0)]
