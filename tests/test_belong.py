"""Ids of one file and meaning of another: what does not belong together is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import ITEM_RELATIONS, Place, load_items, load_truth, require_images
from lever_data.relations.db import connect
from lever_data.report.audit import AuditRequest, audit
from lever_data.report.check import check
from lever_data.report.diff import diff
from lever_data.report.options import DiffRequest, RescoreRequest
from lever_data.report.rescore import rescore
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Run, Store
from tests.cases import long
from tests.stores import candidate, commit, commit_examples

WORDS = [chr(97 + n) * 3 for n in range(12)]
FILE_ORDER = [900, 100, *range(200, 210)]  # sorted by question id, 100 stands before 900


def write_questions(folder: Path) -> list[Path]:
    """Questions and annotations; question ``i`` is answered by the word of its place."""
    asked = [{"question_id": i, "image_id": i, "question": f"q{i}?"} for i in FILE_ORDER]
    noted = [
        {"question_id": i, "answers": [{"answer": word}] * 10}
        for i, word in zip(FILE_ORDER, WORDS, strict=True)
    ]
    for name, content in (("questions", asked), ("annotations", noted)):
        (folder / f"{name}.json").write_text(json.dumps({name: content}))
    return [folder / "questions.json", folder / "annotations.json"]


def write_rl(folder: Path, words: Sequence[str], ids: Sequence[int] = ()) -> Path:
    """RL data that calls these answers right, query by query; ``ids``: the question ids it says."""
    value: dict[str, Any] = {}
    for n, word in enumerate(words):
        scores = {"vqa_pred_answer": word, "vqa_correct": 1, "vqa_acc_score": 1.0}
        value[str(n)] = {"pointer_candidates": [{"pointer": [n + 50], **scores}]}
        if ids:
            value[str(n)]["query"] = {"question_id": ids[n]}
    (folder / "rl.json").write_text(json.dumps(value))
    return folder / "rl.json"


def put(folder: Path, *paths: Path, **options: Any) -> list[Run]:
    given = IngestOptions(dataset="d", split="train", **options)
    return [done.run for done in ingest(paths, Store.create(folder / "s"), given)]


BY_ID = sorted(FILE_ORDER)
WORDS_BY_ID = [WORDS[FILE_ORDER.index(i)] for i in BY_ID]
SHIFTED = [*WORDS[1:], WORDS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("rl_first", [True, long(False)])
def test_rl_data_that_names_other_questions(tmp_path: Path, rl_first: bool) -> None:
    files, rl = write_questions(tmp_path), write_rl(tmp_path, WORDS_BY_ID, BY_ID)
    first, second = ([rl], files) if rl_first else (files, [rl])
    put(tmp_path, *first)
    with pytest.raises(LeverError, match="different questions; at query 0 of d/train") as caught:
        put(tmp_path, *second)
    assert caught.value.value == "question 100 in the RL data, 900 in the examples"
    assert "--order question_id" in str(caught.value.hint)
    assert len(Store.open(tmp_path / "s").runs()) == 1
    put(tmp_path, *files, order="question_id")
    put(tmp_path, rl)
    assert check(Store.open(tmp_path / "s")).problems == ()


@pytest.mark.parametrize("rl_first", [True, False])
def test_rl_data_without_ids_that_answers_other_questions(tmp_path: Path, rl_first: bool) -> None:
    files, rl = write_questions(tmp_path), write_rl(tmp_path, SHIFTED)
    first, second = ([rl], files) if rl_first else (files, [rl])
    put(tmp_path, *first)
    with pytest.raises(LeverError, match=r"to other questions: of 12 .* calls right, 0 are among"):
        put(tmp_path, *second)


@pytest.mark.slow
def test_the_right_files_are_taken_in_any_order(tmp_path: Path) -> None:
    files, rl = write_questions(tmp_path), write_rl(tmp_path, WORDS)
    put(tmp_path, rl, *files)
    (run, _) = Store.open(tmp_path / "s").runs()
    done = rescore(Store.open(tmp_path / "s"), RescoreRequest(run=run.run))
    assert done.changes == ()


def contradict(folder: Path) -> Store:
    """A store of before these checks: query 0 is question 5 of the run, 7 of the examples."""
    store = Store.create(folder / "s")
    commit(store, [candidate(0, 0, [1], correct=1, score=1.0)], question_ids={0: 5})
    item = {"dataset": "d", "split": "train", "question": "?", "answers": ["x"] * 10}
    commit_examples(store, [{**item, "example_id": 0, "question_id": 7}])
    return store


@pytest.mark.long
def test_check_finds_what_contradicts(tmp_path: Path) -> None:
    (problem,) = check(contradict(tmp_path)).problems
    assert problem.where == "query_is_its_example"
    row = problem.examples[0]
    assert (row["question_in_run"], row["question_in_examples"]) == ("5", "7")


@pytest.mark.slow
def test_items_of_a_rollout_or_an_evaluation(tmp_path: Path) -> None:
    con = connect(contradict(tmp_path))
    with pytest.raises(LeverError, match="question 5 in the RL data, 7 in the examples"):
        load_items(con, Place("d", "train"))


@pytest.mark.slow
def test_an_audit_names_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(LeverError, match="question 5 in the RL data, 7 in the examples"):
        audit(contradict(tmp_path), AuditRequest())


def test_an_order_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Input should be 'file' or 'question_id'"):
        put(tmp_path, *write_questions(tmp_path), order="image_id")


@pytest.mark.long
def test_two_runs_that_number_questions_differently(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    rows = [candidate(0, 0, [1], score=1.0)]
    a = commit(store, rows, name="a", question_ids={0: 5})
    b = commit(store, rows, name="b", question_ids={0: 7})
    with pytest.raises(LeverError, match="number their questions differently") as caught:
        diff(store, DiffRequest(a=a.run, b=b.run))
    assert (caught.value.where, caught.value.value) == ("query 0", "questions 5 and 7")
    assert [p.where for p in check(store).problems] == ["query_is_one_question"]


@pytest.mark.slow
def test_check_finds_answers_to_other_questions(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    commit(
        store,
        [
            candidate(n, 0, [90], score=1.0, correct=1, answer=word)
            for n, word in enumerate(SHIFTED)
        ],
    )
    item = {"dataset": "d", "split": "train", "question": "?"}
    commit_examples(
        store,
        [
            {**item, "example_id": n, "question_id": n, "answers": [word] * 10}
            for n, word in enumerate(WORDS)
        ],
    )
    assert [p.where for p in check(store).problems] == ["right_answers_are_known"]


@pytest.mark.slow
def test_training_on_examples_of_other_numbers(tmp_path: Path) -> None:
    from lever_train.learn.data import open_data
    from lever_train.options.train import Source, TrainConfig

    store = contradict(tmp_path)
    np.save(tmp_path / "v.npy", np.eye(2, dtype=np.float32))
    data = {"view": ["all_candidates"], "query_embeddings": str(tmp_path / "v.npy")}
    config = TrainConfig.model_validate({"data": {**data, "split_ratio": 1.0}})
    with pytest.raises(LeverError, match="question 5 in the RL data, 7 in the examples"):
        open_data(Source(store=store.path), config)


@pytest.mark.slow
def test_a_query_in_its_own_pointer_is_found_left_out_and_counted(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    commit(store, [candidate(3, 0, [3, 1]), candidate(3, 1, [1, 2]), candidate(4, 0, [4])])
    con = connect(store)
    left = "select query_id, candidate from all_candidates"
    assert con.execute(left).fetchall() == [(3, 1)]
    assert con.execute("select count(*) from own_pointers").fetchall() == [(2,)]
    (problem,) = check(store).problems
    assert (problem.where, problem.what[:11]) == ("pointer_leaves_out_its_query", "2 rows fail")


@pytest.mark.slow
def test_an_item_without_an_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path, *write_questions(tmp_path))
    con = connect(tmp_path / "s")
    blind = load_items(con, Place("d", "train"))
    with pytest.raises(LeverError, match="12 of 12 items have no image; at item 0 of d/train"):
        require_images(blind.values())
    lost = load_items(con, Place("d", "train", tmp_path / "images"))
    with pytest.raises(LeverError, match="the images are not in this folder"):
        require_images(lost.values())
    named = load_items(con, Place("d", "train", tmp_path, "{image_id}.jpg"))
    (tmp_path / "900.jpg").write_bytes(b"x")
    require_images(named.values())  # one that is missing fails alone


def test_question_0_has_its_annotation(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    item = {"dataset": "d", "split": "train", "question": "?", "answers": ["x"] * 10}
    commit_examples(store, [{**item, "example_id": 0, "question_id": 0, "image_id": 0}])
    truths = load_truth(load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train")))
    assert truths[0].official and truths[0].answers == ("x",) * 10
