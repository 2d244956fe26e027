"""A task as data: templates, how a text becomes an answer, metrics, and the whole way with them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Item, Prompt
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task, read_task, require_shown, stored_task
from lever_data.items.text_metrics import CiderD, label_match, rouge_l, squad_exact, squad_f1
from lever_data.items.vqa_metric import METRIC_VERSION
from lever_data.report.check import check
from lever_data.report.options import RescoreRequest
from lever_data.report.rescore import rescore
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_train.evaluate.api import run_evaluation
from lever_train.evaluate.heldout import open_held_out
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import asked_task, template_of
from lever_train.rollout.generate import generate
from lever_train.rollout.resolve import resolve
from tests.rollouts import World, make_world, rows

PASSAGE = Item(
    "d", "s", 0, "Who?", ("Ann",), "Ann", fields={"context": "Ann sang {question}.", "n": "1"}
)


def test_vqa_is_the_default_and_a_built_in_task_gives_what_is_not_set(tmp_path: Path) -> None:
    assert read_task("vqa") == Task() and read_task("vqa").stored() == {}
    assert Task(name="qa").metric == "squad-f1" and Task(name="qa", metric="label").stop == ("\n",)
    file = tmp_path / "t.toml"
    file.write_text('[task]\nname = "choice"\nquery = "Is it {question}?"\n')
    task = read_task(file)
    assert task == Task(name="choice", query="Is it {question}?")
    assert Task.model_validate(task.stored()) == task  # as the store keeps it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[task]\nquery = "{question} {answer}"\n', "shows its own {answer}"),
        ('[task]\ndemonstration = "{question}"\n', "does not show {answer}"),
        ('[task]\nname = "qa"\nquery = "Answer:"\n', "does not show its input"),
        ('[task]\nqeury = "?"\n', "unknown key"),
        ('[task]\nname = "vaq"\n', "not allowed"),
        ("[tasks]\n", r"no table \[task\]"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        read_task(tmp_path / "t.toml")
    assert "t.toml" in str(refused.value.where)


def test_a_template_shows_the_fields_of_an_item() -> None:
    task = Task(name="qa").with_field("context")
    template = template_of(AnswererSpec(api="completions"), task)
    assert template.text(Prompt(PASSAGE, (PASSAGE,))) == (
        "Context: Ann sang {question}.\nQuestion: Who?\nAnswer: Ann\n\n"
        "Context: Ann sang {question}.\nQuestion: Who?\nAnswer:"
    )
    require_shown(task, [PASSAGE])
    with pytest.raises(LeverError, match=r"names \{passage\}, which an item does not have"):
        require_shown(Task(name="qa").with_field("passage"), [PASSAGE])


def test_what_the_answerer_is_told_goes_before_the_task() -> None:
    spec = AnswererSpec(images=False, stop=("##",), cut_at=("#",))
    task = asked_task(Task(name="qa"), spec)
    assert (task.stop, task.cut_at, task.metric) == (("##",), ("#",), "squad-f1")
    assert asked_task(Task(), spec).images is False
    assert task.answer(" \n Paris # of") == "Paris"
    assert Task(name="qa", normalize="squad").answer("The Eiffel!\nx") == "eiffel"


def test_a_text_that_is_gone_on_with_has_an_end() -> None:
    """A base model that is shown `vqa` would write the next question, and the one after."""
    task = asked_task(Task(), AnswererSpec(api="completions"))
    assert task.stop == ("\n", "Question", "Answer", "Short") and task.reading() == ""
    assert asked_task(Task(), AnswererSpec()).stop == ()
    assert asked_task(Task(), AnswererSpec(api="completions", stop=("#",))).stop == ("#",)
    assert asked_task(Task(name="qa"), AnswererSpec(api="completions")).stop == ("\n",)


def test_squad_is_what_its_evaluation_computes() -> None:
    """Figures worked out by hand from the definitions of the SQuAD evaluation."""
    said = ["the Eiffel Tower.", "Paris France", "", "in 1889", ""]
    known = [["Eiffel tower"], ["Paris", "France capital"], ["Paris"], ["1889", "year 1889"], [""]]
    assert squad_exact(said, known) == [1, 0, 0, 0, 1]
    assert squad_f1(said, known) == pytest.approx([1, 2 / 3, 0, 2 / 3, 1])


def test_a_label_or_its_letter() -> None:
    said = ["Blue.", "(b) blue", "B", "b: it is", "bluebird", "A", "blue sky", "be"]
    assert label_match(said, [["B", "blue"]] * 8) == [1, 1, 1, 1, 0, 0, 0, 0]
    digits = ["2. blue", "(2)", "2.5", "1", "- blue"]
    assert label_match(digits, [["2", "blue"]] * 5) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "labels", [["+", "-"], ["1", "-1"], ["C", "C++", "C#"], ["50", "50%", "$50"]]
)
def test_a_sign_is_part_of_a_label(labels: list[str]) -> None:
    for label in labels:
        found = label_match([f'"{one}".' for one in labels], [[label]] * len(labels))
        assert found == [float(one == label) for one in labels]
        assert label_match(["", "."], [[label]] * 2) == [0, 0]


REFERENCES = [
    ["a man rides a horse on the beach", "man riding a brown horse near the sea"],
    ["two dogs play with a ball", "dogs are playing in the grass with a red ball"],
    ["a plate of food on a table", "a table with a white plate of pasta"],
]
CAPTIONS = ["a man rides a brown horse", "two dogs with a ball", "a cat"]
# of pycocoevalcap 1.2, whose CiderScorer is that of CIDEr-D: clipped counts, sigma 6
CIDER_D = [3.602873313, 2.579407509, 0.0]
ROUGE_L = [0.696347032, 0.894428152, 0.201986755]


def test_captions_are_scored_as_the_coco_evaluation_does() -> None:
    found = CiderD(REFERENCES)(CAPTIONS, REFERENCES)
    assert 10 * np.array(found) == pytest.approx(CIDER_D, abs=1e-6)
    assert rouge_l(CAPTIONS, REFERENCES) == pytest.approx(ROUGE_L, abs=1e-6)


def own_metric(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, name: str) -> Task:
    (folder / f"{name}.py").write_text(f"def score(predictions, references):\n    {body}\n")
    monkeypatch.chdir(folder)
    return Task(metric=f"python:{name}.score")


def test_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "return [len(p) / 10 for p in predictions]"
    task = own_metric(tmp_path, body, monkeypatch, "own_a").but(correct_above=0.2)
    scoring = Scoring(task)
    scores = scoring.score(["a", "abc"], [["x"], ["x"]])
    assert scores.tolist() == [0.1, 0.3]
    assert scoring.is_right(["a", "abc"], [["x"], ["x"]], scores).tolist() == [False, True]
    other = own_metric(tmp_path, "return [0.5]", monkeypatch, "own_b")
    assert Scoring(other).scorer("m") != scoring.scorer("m")  # its source is part of the name


@pytest.mark.slow
def test_a_metric_that_was_edited_is_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name and its figures are of one text: in a process that knew the old one, too."""
    found = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for score in ("0.2", "0.7"):
            body = f"return [{score} for p in predictions]"
            task = own_metric(tmp_path / folder, body, monkeypatch, "own_edited")
            scoring = Scoring(task)
            found[folder, score] = (scoring.name, scoring.score(["x"], [["y"]]).tolist())
    assert found["a", "0.2"] == found["b", "0.2"] and found["a", "0.7"] == found["b", "0.7"]
    assert found["a", "0.2"][0] != found["a", "0.7"][0]
    assert (found["a", "0.2"][1], found["a", "0.7"][1]) == ([0.2], [0.7])


def test_a_metric_is_also_what_it_imports_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that was edited makes another metric, in a process that knew the old one, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_helped.py").write_text(
        "import json\nfrom own_helper import worth\n"
        "def score(predictions, references):\n    return [worth(p) for p in predictions]\n"
    )
    (tmp_path / "own_stranger.py").write_text("raise RuntimeError\n")
    found = []
    for worth in ("0.2", "0.7", "0.2"):
        (tmp_path / "own_helper.py").write_text(f"def worth(p):\n    return {worth}\n")
        scoring = Scoring(Task(metric="python:own_helped.score"))
        found.append((scoring.name, scoring.score(["x"], [["y"]]).tolist()))
    assert found[0] == found[2] and found[0][0] != found[1][0]
    assert (found[0][1], found[1][1]) == ([0.2], [0.7])


def test_a_metric_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").write_text("")
    (tmp_path / "own_pack" / "rule.py").write_text("BEST = 0.5\n")
    (tmp_path / "own_pack" / "metric.py").write_text(
        "from .rule import BEST\ndef score(p, r):\n    return [BEST] * len(p)\n"
    )
    scoring = Scoring(Task(metric="python:own_pack.metric.score"))
    assert scoring.score(["x"], [["y"]]).tolist() == [0.5]
    (tmp_path / "own_pack" / "rule.py").write_text("BEST = 0.6\n")
    other = Scoring(Task(metric="python:own_pack.metric.score"))
    assert other.score(["x"], [["y"]]).tolist() == [0.6] and other.name != scoring.name
    # lever's own are found, and stay what they are
    assert Scoring(Task(metric="python:lever_data.items.text_metrics.rouge_l")).name
    assert sys.modules["lever_data.items.task"].Task is Task


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [float('nan')]", r"outside \[0, 1\].*nan for the prediction 'a'"),
        ("return [2]", r"outside \[0, 1\]"),
        ("return []", "does not give one number a prediction"),
        ("raise KeyError('k')", "the metric failed .KeyError: 'k'"),
        ("return 'abc'", "the metric failed"),
    ],
)
def test_a_metric_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    name = f"bad_{abs(hash(body))}"
    with pytest.raises(LeverError) as error:
        Scoring(own_metric(tmp_path, body, monkeypatch, name)).score(["a"], [["x"]])
    assert re.search(said, error.value.message())
    assert error.value.where and "one float in [0, 1] a prediction" in str(error.value.hint)
    with pytest.raises(UsageError, match="cannot be loaded"):
        Scoring(Task(metric="python:no_such_module.f"))
    with pytest.raises(UsageError, match="no such metric"):
        Scoring(Task(metric="vqa"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, queries=24)


def put(world: World, task: Task | None) -> Store:
    store, files = Store.create(world.store), [world.questions, world.annotations]
    list(ingest(files, store, IngestOptions(dataset="d", split="train", task=task)))
    return store


def asked(world: World, **more: Any) -> Any:
    return world.request(questions=None, annotations=None, **more)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",  # test_examples.py goes the way of the other two, too
    ["choice", *(pytest.param(n, marks=pytest.mark.long) for n in ("qa", "caption"))],
)
def test_the_whole_way_with_another_task(world: World, name: Any) -> None:
    """Ingest, generate, rewards, check, eval and rescore by the task that was ingested."""
    store = put(world, Task(name=name))
    task = stored_task(store.runs(), "d", "train")
    assert task.name == name
    job = resolve(asked(world))
    found = rows(generate(asked(world)).run)
    assert {r["metric"] for r in found} == {job.scoring.name} != {METRIC_VERSION}
    assert {r["scorer"] for r in found} == {f"nearest~{job.scoring.name}"}
    said = [r["answer"] for r in found]
    truths = [job.truths[r["query_id"]].answers for r in found]
    scores = job.scoring.score(said, truths)
    assert [r["score"] for r in found] == scores.tolist()
    assert [r["correct"] for r in found] == job.scoring.is_right(said, truths, scores).tolist()
    assert all(r["eval_mode"] == "file" and 0 <= r["expected_score"] <= 1 for r in found)
    assert not check(store).problems
    with connect(store) as con:
        sql = "select avg(correct), avg(score), min(metric) from all_candidates"
        mean, score, metric = con.execute(sql).fetchall()[0]
    assert (mean, score) == pytest.approx((np.mean([r["correct"] for r in found]), scores.mean()))
    assert metric == job.scoring.name
    questions = Questions(
        dataset="d", split="train", query_embeddings=str(world.embeddings), pool=world.pool
    )
    request = EvalRequest(
        store=world.store, questions=questions, contest=Contest(shots=(1,), limit=9)
    )
    board = run_evaluation(request)
    assert all(0 <= row.accuracy <= 1 for row in board.scoreboard.rows)
    assert board.scoreboard.metric == job.scoring.name  # not called a VQA accuracy
    (run,) = (r for r in store.runs() if r.kind == "evaluation")
    assert {r["metric"] for r in rows(run, "evaluations")} == {job.scoring.name}
    rollout = next(r.run for r in store.runs() if r.kind == "rollout")
    assert not rescore(store, RescoreRequest(run=rollout)).changes  # the same metric again
    changed = rescore(store, RescoreRequest(run=rollout, task=Task()))
    assert {r["scorer"] for r in rows(changed.run)} == {"nearest"}
    assert {r["metric"] for r in rows(changed.run)} == {METRIC_VERSION}


@pytest.mark.slow
def test_a_task_named_is_an_override(world: World) -> None:
    put(world, None)
    plain, other = resolve(asked(world)), resolve(asked(world, task=Task(name="qa")))
    assert plain.scoring.name == METRIC_VERSION and other.scoring.name == "squad-f1-1"
    assert plain.spec.run_id() != other.spec.run_id()


@pytest.mark.slow
def test_words_are_as_rare_for_some_queries_as_for_all(world: World) -> None:
    """CIDEr-D of a caption is that of its split, whichever queries are evaluated."""
    put(world, Task(name="caption"))
    views = world.store / "views"
    views.mkdir()
    (views / "few.sql").write_text(
        "select dataset, split, example_id as query_id from examples where example_id < 4"
    )
    each = {"dataset": "d", "split": "train", "candidate_split": "train", "pool": world.pool}
    with connect(world.store) as con:
        found = [
            open_held_out(
                con,
                Questions(query_embeddings=str(world.embeddings), queries=queries, **each),
                task=Task(name="caption"),
            )
            for queries in (None, "few")
        ]
    assert [len(held) for held in found] == [24, 4]
    assert found[0].scoring.name == found[1].scoring.name == resolve(asked(world)).scoring.name


def test_a_metric_that_fails_leaves_no_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = put(world, own_metric(tmp_path, "return [1 / 0]", monkeypatch, "own_zero"))
    with pytest.raises(LeverError, match="ZeroDivisionError"):
        generate(asked(world))
    assert [r.kind for r in store.runs()] == ["examples"]
    assert json.dumps(stored_task(store.runs(), "d", "train").stored())
