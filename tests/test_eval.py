"""`lever eval` and `lever predict`: picks, answers, accuracies and intervals, each checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lever_cli.eval import show_scoreboard
from PIL import Image

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import ITEM_RELATIONS
from lever_data.items.prompts import Prompt
from lever_data.items.vqa_metric import vqa_accuracy
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.files import sha256_file
from lever_data.store.store import Store
from lever_demo.files import DATASET, WorldFiles, write_world
from lever_demo.world import World, WorldSpec, make_world
from lever_train.evaluate import baselines
from lever_train.evaluate.api import Evaluation, predict, run_evaluation
from lever_train.evaluate.evaluate import EvalOptions, evaluate
from lever_train.evaluate.heldout import HeldOut, open_held_out
from lever_train.evaluate.predictions import write_picks
from lever_train.evaluate.scoreboard import scoreboard
from lever_train.evaluate.scoreboard_page import scoreboard_page
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.options.rollout import AnswererSpec
from lever_train.options.train import ModelConfig
from lever_train.rollout.answerers import Answer
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.policy import load_policy
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.kinds import make_selector
from tests.commands import lever
from tests.endpoint import serving

SPEC = WorldSpec(train=120, held_out=50, pool=10)


class Place:
    """A world on disk, its train split in a store, and a selector nobody trained."""

    def __init__(self, folder: Path) -> None:
        self.world: World = make_world(SPEC)
        self.files: WorldFiles = write_world(self.world, folder / "world")
        self.store = Store.create(folder / "store")
        paths = [self.files.rl_data, self.files.questions("train"), self.files.annotations("train")]
        assert (
            len(list(ingest(paths, self.store, IngestOptions(dataset=DATASET, split="train")))) == 2
        )
        torch.manual_seed(0)
        self.checkpoint = folder / "fresh.pt"
        selector = make_selector(96, ModelConfig(hidden=32))
        save_v3(self.checkpoint, selector, Progress(1, "rce", 0.1, {}))

    @property
    def questions(self) -> Questions:
        return Questions(
            dataset=DATASET,
            query_embeddings=str(self.files.embeddings("val")),
            candidate_embeddings=str(self.files.embeddings("train")),
            pool=self.files.pool("val"),
            questions=self.files.questions("val"),
            annotations=self.files.annotations("val"),
        )

    def held(self) -> HeldOut:
        return open_held_out(connect(self.store, only=ITEM_RELATIONS), self.questions)

    def request(self, **contest: object) -> EvalRequest:
        return EvalRequest(
            store=self.store.path,
            checkpoints=(self.checkpoint,),
            questions=self.questions,
            contest=Contest.model_validate(contest),
        )

    @property
    def flags(self) -> list[str]:
        q = self.questions
        named = {
            "store": self.store.path,
            "checkpoint": self.checkpoint,
            "dataset": DATASET,
            "split": "val",
            "query-embeddings": q.query_embeddings,
            "candidate-embeddings": q.candidate_embeddings,
            "pool": q.pool,
            "questions": q.questions,
            "annotations": q.annotations,
        }
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def evaluated(place: Place) -> Evaluation:
    return run_evaluation(place.request())


def _answerer(place: Place) -> NearestAnswerer:
    train, val = place.world.train.embedding, place.world.held_out.embedding
    return NearestAnswerer(val, train, [tuple(a) for a in place.world.train.answers])


def _says(place: Place, query: int, shown: Sequence[int]) -> str:
    """What the nearest rule answers, written out for one query."""
    sums: Counter[str] = Counter()
    vector = place.world.held_out.embedding[query]
    for item in shown:
        weight = float(np.exp(vector @ place.world.train.embedding[item] / 0.05))
        for word in place.world.train.answers[item]:
            sums[word] += weight  # type: ignore[assignment]
    total = sum(sums.values())
    return max((round(value / total, 6), word) for word, value in sums.items())[1]


@pytest.mark.slow
def test_accuracies_are_those_of_the_rule(place: Place, evaluated: Evaluation) -> None:
    answers = place.world.held_out.answers
    for outcome in evaluated.outcomes:
        if outcome.shots == 0:
            continue
        said = [_says(place, q, outcome.pointer[q].tolist()) for q in range(SPEC.held_out)]
        assert list(outcome.predictions) == said
        assert outcome.accuracy.tolist() == vqa_accuracy(said, answers).tolist()


def test_zero_shot_gives_the_commonest_training_answer(place: Place, evaluated: Evaluation) -> None:
    words = Counter(word for said in place.world.train.answers for word in said)
    commonest = max((count, word) for word, count in words.items())[1]
    outcome = evaluated.outcomes[0]
    assert (outcome.selector, outcome.shots) == ("zero_shot", 0)
    assert set(outcome.predictions) == {commonest}


def test_nearest_is_the_head_of_the_pool_and_shots_are_nested(
    place: Place, evaluated: Evaluation
) -> None:
    by_name = {(o.selector, o.shots): o for o in evaluated.outcomes}
    for name in ("random", "nearest", "oracle", "fresh"):
        for shots in (1, 2, 3):
            more = by_name[name, shots + 1].pointer
            assert (by_name[name, shots].pointer == more[:, :shots]).all()
    assert (by_name["nearest", 4].pointer == place.world.held_out_pool[:, :4]).all()
    drawn = by_name["random", 4].pointer
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    pool = place.world.held_out_pool
    assert all(set(row) <= set(pool[q]) for q, row in enumerate(drawn.tolist()))


def test_the_oracle_is_exact_at_one_shot_and_greedy_after(
    place: Place, evaluated: Evaluation
) -> None:
    by_name = {(o.selector, o.shots): o for o in evaluated.outcomes}
    answers, pool = place.world.held_out.answers, place.world.held_out_pool.tolist()
    for query in range(SPEC.held_out):
        shown: list[int] = []
        for shots in (1, 2):
            rest = [item for item in pool[query] if item not in shown]
            tried = [_says(place, query, [*shown, item]) for item in rest]
            scores = vqa_accuracy(tried, [answers[query]] * len(rest))
            shown.append(rest[int(scores.argmax())])
            assert by_name["oracle", shots].accuracy[query] == scores.max()
        assert by_name["oracle", 2].pointer[query].tolist() == shown


def test_the_selector_picks_what_its_scores_say(place: Place, evaluated: Evaluation) -> None:
    policy = load_policy(place.checkpoint, "cpu")
    expected = baselines.greedy(policy, place.held().ask, 4)
    found = next(o for o in evaluated.outcomes if (o.selector, o.shots) == ("fresh", 4))
    assert (found.pointer == expected).all()


@pytest.mark.long
def test_a_selector_that_ends_at_once_is_judged_as_zero_shot(
    place: Place, evaluated: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And against it; how many demonstrations it shows is said."""
    selector = make_selector(96, ModelConfig(selector="stop", hidden=32))
    token = selector.state_dict()["stop_token"]
    selector.state_dict()["step_emb.weight"].copy_(1e4 * token.expand(4, -1))  # it wins every step
    save_v3(tmp_path / "stop.pt", selector, Progress(1, "rce", 0.1, {}))
    request = place.request(shots=(1, 3)).but(checkpoints=(tmp_path / "stop.pt",))
    found = run_evaluation(request)
    by_name = {(o.selector, o.shots): o.predictions for o in found.outcomes}
    nothing = by_name["zero_shot", 0]
    assert by_name["stop", 1] == by_name["stop", 3] == nothing != by_name["nearest", 1]
    assert predict(request)["pointer"].to_pylist() == [[]] * 50
    shown = {(r.selector, r.shots): r.shown for r in found.scoreboard.rows}
    assert shown["stop", 3] == 0.0 and shown["nearest", 3] is shown["zero_shot", 0] is None
    pairs = {(p.a, p.b, p.shots): p for p in found.scoreboard.paired}
    assert pairs["stop", "zero_shot", 3].difference == 0.0 and pairs["stop", "zero_shot", 1].n == 50
    show_scoreboard(found.scoreboard)
    assert re.search(r"stop +50 +0\.00 +0\.00", capsys.readouterr().out)


def test_rows_and_pairs(evaluated: Evaluation) -> None:
    board = evaluated.scoreboard
    by_name = {(o.selector, o.shots): o.accuracy for o in evaluated.outcomes}
    for row in board.rows:
        assert row.accuracy == pytest.approx(by_name[row.selector, row.shots].mean())
        assert row.low <= row.accuracy <= row.high and (row.n, row.failed) == (50, 0)
    assert {(p.a, p.b, p.shots) for p in board.paired} == {
        ("fresh", b, s) for b in ("random", "nearest", "vote") for s in (1, 2, 3, 4)
    }
    for pair in board.paired:
        change = by_name[pair.a, pair.shots] - by_name[pair.b, pair.shots]
        assert pair.difference == pytest.approx(change.mean())
        only = (by_name[pair.a, pair.shots] > 0) & ~(by_name[pair.b, pair.shots] > 0)
        assert pair.only_a == int(only.sum())


def test_copied_answers_are_those_of_a_demonstration(place: Place, evaluated: Evaluation) -> None:
    rows = {(r.selector, r.shots): r.copied for r in evaluated.scoreboard.rows}
    shown = {number: item.answer for number, item in place.held().examples.items()}
    assert rows["zero_shot", 0] is None
    for outcome in evaluated.outcomes:
        if not outcome.shots:
            continue
        wrong = np.flatnonzero(~outcome.right).tolist()
        copies = [
            outcome.predictions[i] in [shown[e] for e in outcome.pointer[i].tolist()] for i in wrong
        ]
        expected = sum(copies) / len(copies) if copies else None
        assert rows[outcome.selector, outcome.shots] == pytest.approx(expected)


@pytest.mark.long
def test_many_checkpoints_on_one_split_are_called_out(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for number in range(6):
        torch.manual_seed(number)
        selector = make_selector(96, ModelConfig(hidden=8))
        save_v3(tmp_path / f"c{number}.pt", selector, Progress(1, "rce", 0.1, {}))
    request = place.request(shots=(1,), limit=5, oracle="no")
    said = [
        run_evaluation(request.but(checkpoints=(tmp_path / f"c{number}.pt",))).notices
        for number in range(6)
    ]
    assert not any(said[:5]) and "6 checkpoints were judged by demo/val" in said[5][0]


@pytest.mark.long
def test_an_evaluation_is_a_run_and_its_scores_are_a_query(
    place: Place, evaluated: Evaluation
) -> None:
    run = place.store.run(str(evaluated.scoreboard.run))
    assert (run.kind, run.num_rows) == ("evaluation", 50 * (1 + 5 * 4))
    con = connect(place.store, runs=[run.run])
    found = con.execute("select selector, shots, mean_accuracy from evaluation_scores").fetchall()
    expected = {(r.selector, r.shots): r.accuracy for r in evaluated.scoreboard.rows}
    assert {(s, k): a for s, k, a in found} == pytest.approx(expected)
    again = run_evaluation(place.request())
    assert again.scoreboard == evaluated.scoreboard and not again.is_new


@pytest.mark.slow
def test_limits_are_nested_subsets(place: Place, evaluated: Evaluation) -> None:
    found = run_evaluation(place.request(sizes=(10, 20, 400), shots=(1,), oracle="no"))
    whole = next(o for o in evaluated.outcomes if (o.selector, o.shots) == ("nearest", 1))
    rows = [r for r in found.scoreboard.rows if r.selector == "nearest"]
    assert [r.n for r in rows] == [10, 20, 50]
    for row in rows:
        assert row.accuracy == pytest.approx(whole.accuracy[: row.n].mean())
    with pytest.raises(UsageError, match="more questions than --limit leaves"):
        place.request(limit=10, sizes=(20,))


@pytest.mark.long
def test_other_images_make_another_evaluation(place: Place, tmp_path: Path) -> None:
    """Under the same names: what was shown counts, and nothing else in the folder."""
    asked = place.questions.but(image_root=tmp_path)
    held = open_held_out(connect(place.store, only=ITEM_RELATIONS), asked, 4)
    shown = [item.image for item in (*held.queries, *held.examples.values())]
    for path in shown:
        assert path is not None
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (len(path.name), int(path.stem[-3:]) % 256, 0)).save(path)
    with serving() as endpoint:
        spec = AnswererSpec(spec=f"openai:{endpoint.url}", model="m")
        request = place.request(shots=(1,), limit=4, oracle="no").but(
            questions=asked, answerer=spec
        )
        first = run_evaluation(request)
        (tmp_path / "other.jpg").write_bytes(b"never shown")
        assert not run_evaluation(request).is_new
        assert held.queries[0].image is not None
        Image.new("RGB", (4, 4), "white").save(held.queries[0].image)
        again = run_evaluation(request)
    assert again.is_new and again.scoreboard.run != first.scoreboard.run


@pytest.mark.long
def test_failed_answers_are_left_out_and_counted(place: Place) -> None:
    inner = _answerer(place)

    def answer(prompts: Sequence[Prompt]) -> list[Answer]:
        found = inner.answer(prompts)
        lost = {p.query.example_id for p in prompts if p.query.example_id % 5 == 0}
        return [
            Answer(None, error="gone") if p.query.example_id in lost else a
            for p, a in zip(prompts, found, strict=True)
        ]

    policies = {"fresh": load_policy(place.checkpoint, "cpu")}
    outcomes = evaluate(place.held(), answer, policies, EvalOptions(shots=(1,), oracle=True))
    board = scoreboard(outcomes)
    assert {(r.n, r.failed) for r in board.rows} == {(40, 10)}
    assert {p.n for p in board.paired} == {40}
    assert all(o.predictions[5] is None and o.errors[5] == "gone" for o in outcomes)
    everything = evaluate(
        place.held(), lambda ps: [Answer(None, error="down") for _ in ps], {}, EvalOptions((1,))
    )
    with pytest.raises(LeverError, match=r"failed on every query.*down"):
        scoreboard(everything)


def test_predictions_are_the_picks(place: Place, evaluated: Evaluation) -> None:
    picks = predict(place.request(shots=(4,), oracle="no"))
    found = next(o for o in evaluated.outcomes if (o.selector, o.shots) == ("fresh", 4))
    assert picks.column("pointer").to_pylist() == found.pointer.tolist()
    asked = json.loads(place.files.questions("train").read_text())["questions"]
    first = picks.slice(0, 1).to_pylist()[0]
    assert first["demonstration_question_ids"] == [
        asked[i]["question_id"] for i in first["pointer"]
    ]


@pytest.mark.slow
def test_an_evaluation_and_a_prediction_say_what_they_were_made_from(
    place: Place, evaluated: Evaluation, tmp_path: Path
) -> None:
    """The pool of another split gives other figures: `lever runs show` tells the two apart."""
    run = place.store.run(str(evaluated.scoreboard.run))
    inputs = {one["role"]: one for one in run.details["inputs"]}
    assert inputs["checkpoint fresh"]["sha256"] == sha256_file(place.checkpoint)
    assert set(inputs) >= {"checkpoint fresh", "query embeddings", "candidate embeddings", "pool"}
    assert inputs["pool"]["sha256"] == sha256_file(Path(inputs["pool"]["path"]))
    assert run.parents and {r.kind for r in map(place.store.run, run.parents)} == {"examples"}
    shown = lever("runs", "show", run.run, "--store", place.store.path).stdout
    for one in inputs.values():
        assert one["sha256"] in shown.replace("\n", "")
    write_picks(predict(place.request(shots=(2,))), tmp_path / "picks.jsonl")
    beside = json.loads((tmp_path / "picks.jsonl.provenance.json").read_text())
    assert [i for i in beside["inputs"] if i["role"] == "pool"] == [inputs["pool"]]
    assert (beside["dataset"], beside["split"]) == (DATASET, "val")


def _words(text: str) -> list[str]:
    """What is read on a page, piece by piece."""
    return [unescape(word) for word in re.findall(r">([^<>]+)<", text.partition("<body>")[2])]


def _chart(text: str) -> dict[str, Any]:
    spec = re.search(r'data-chart="([^"]+)"', text)
    assert spec is not None
    chart: dict[str, Any] = json.loads(unescape(spec[1]))
    return chart


def test_the_page_says_what_it_is_of_and_draws_every_selector(
    place: Place, evaluated: Evaluation
) -> None:
    text = scoreboard_page(evaluated.scoreboard)
    words = _words(text)
    for said in (f"{DATASET}/val", "nearest", str(place.checkpoint), evaluated.scoreboard.run):
        assert said in words
    names = [line["name"] for line in _chart(text)["lines"]]
    assert names == ["zero_shot", "random", "nearest", "vote", "fresh", "oracle (≥)"]


def test_the_page_calls_the_oracle_a_lower_bound(evaluated: Evaluation) -> None:
    text = scoreboard_page(evaluated.scoreboard)
    words = _words(text)
    by_shots = {r.shots: r.accuracy for r in evaluated.scoreboard.rows if r.selector == "oracle"}
    assert f"{by_shots[1]:.2%}" in words
    for shots in (2, 3, 4):
        assert f"≥ {by_shots[shots]:.2%}" in words
    assert sum(word.startswith("≥ ") for word in words) == 3
    assert any("a lower bound" in word for word in words)
    one = replace(
        evaluated.scoreboard, rows=tuple(r for r in evaluated.scoreboard.rows if r.shots < 2)
    )
    assert "≥" not in "".join(_words(scoreboard_page(one)))


@pytest.mark.long
def test_the_page_charts_the_most_questions_and_says_so(
    place: Place, evaluated: Evaluation
) -> None:
    board = run_evaluation(place.request(sizes=(10, 20, 50), shots=(1, 2))).scoreboard
    text = scoreboard_page(board)
    said = "The chart shows the first 50 questions; the tables also hold the first 10 and the "
    assert f"{said}first 20." in "".join(_words(text))
    values = [y for line in _chart(text)["lines"] for y in line["y"] if y is not None]
    assert len(values) == len(board.rows) // 3
    assert text.count("<tr") == len(board.rows) + len(board.paired) + 2
    assert "The chart shows" not in scoreboard_page(evaluated.scoreboard)


@pytest.mark.slow
def test_the_command(place: Place, tmp_path: Path) -> None:
    out, chart = tmp_path / "e.json", tmp_path / "e.html"
    done = lever(
        "eval",
        *place.flags,
        "--answerer",
        "nearest",
        "--shots",
        "1,2",
        "--json",
        out,
        "--html",
        chart,
    )
    assert "fresh - nearest" in done.stdout and "a lower bound" in done.stdout
    found = json.loads(out.read_text())
    assert {"selector", "shots", "accuracy", "low", "high", "n"} <= set(found["rows"][0])
    assert chart.read_text().startswith("<!doctype html>")
    jsonl, parquet = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    for path in (jsonl, parquet):
        lever("predict", *place.flags, "--out", path, "--shot-num", "2")
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert rows == pq.read_table(parquet).to_pylist() and len(rows) == 50


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--shots", "0"], 2, "greater than or equal to 1; at --shots"),
        (["--shots", "1,1"], 2, "--shots are distinct numbers from 1 on"),
        (["--oracle", "maybe"], 2, "'maybe' is not one of 'auto', 'yes', 'no'"),
        (["--pool", "none.npy"], 2, "there is no such pool file"),
        (["--answerer", "oracle", "--image-root", "."], 2, "unknown answerer"),
        (["--split", "train"], 1, "the questions file is not that of the stored split"),
        (["--shots", "11"], 1, "11 demonstrations cannot be picked from this query's pool"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    place: Place, flags: list[str], code: int, message: str
) -> None:
    done = lever("eval", *place.flags, *flags, check=False)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_numbers_may_stand_behind_one_flag_or_several(place: Place) -> None:
    flags = ["--shots", "1", "--shots", "2,3", "--limit", "5", "--json", "-"]
    done = lever("eval", *place.flags, *flags)
    rows = json.loads(done.stdout)["rows"]
    assert {row["shots"] for row in rows} == {0, 1, 2, 3}
    assert (
        "--shots are distinct" in lever("eval", *place.flags, *flags[:3], "1", check=False).stderr
    )


@pytest.mark.slow
def test_a_view_of_other_queries_is_refused(place: Place) -> None:
    views = place.store.path / "views"
    views.mkdir(exist_ok=True)
    sql = "select 'demo' as dataset, 'val' as split, unnest([3, 50, 51]) as query_id"
    (views / "too_many.sql").write_text(sql)
    with pytest.raises(
        LeverError, match="2 of 3 queries of the view are not questions of demo/val"
    ):
        open_held_out(connect(place.store), place.questions.but(queries="too_many"))


@pytest.mark.slow
def test_the_table_says_which_checkpoint_it_is_of(place: Place) -> None:
    done = lever("eval", *place.flags, "--shots", "1", "--limit", "5")
    digest = sha256_file(place.checkpoint)[:12]
    head = done.stdout.splitlines()[0]
    assert f"dataset/split demo/val, checkpoints fresh {place.checkpoint}@{digest}" in head
    assert all(word in head for word in ("answerer nearest", "date 20", "run evaluation-demo-val"))


@pytest.mark.slow
def test_a_pick_needs_embeddings_of_the_candidates(place: Place) -> None:
    questions = place.questions.but(candidate_embeddings=None)
    with pytest.raises(UsageError, match="need embeddings of their own"):
        open_held_out(connect(place.store, only=ITEM_RELATIONS), questions)


@pytest.mark.slow
def test_embeddings_of_another_split_are_refused(place: Place) -> None:
    other = place.questions.but(query_embeddings=place.questions.candidate_embeddings)
    with pytest.raises(LeverError, match=r"embeddings have \d+ rows, the split val has \d+ quest"):
        open_held_out(connect(place.store, only=ITEM_RELATIONS), other)


@pytest.mark.slow
def test_a_pool_of_another_split_is_refused_with_both_sizes(place: Place) -> None:
    """Rows of train's pools read as val's: every question would be shown another's pool."""
    other = place.questions.but(pool=place.files.pool("train"))
    with pytest.raises(LeverError, match=r"has \d+ rows, the split val has \d+ questions"):
        open_held_out(connect(place.store, only=ITEM_RELATIONS), other)


@pytest.mark.parametrize("command", [run_evaluation, predict])
def test_a_checkpoint_of_another_width_is_refused_before_any_answer(
    place: Place, tmp_path: Path, command: Callable[[EvalRequest], object]
) -> None:
    wide = tmp_path / "wide.pt"
    save_v3(wide, make_selector(97, ModelConfig(hidden=32)), Progress(1, "rce", 0.1, {}))
    with pytest.raises(LeverError, match=r"of width 97, the embeddings have 96; at wide\.pt"):
        command(place.request().but(checkpoints=(wide,)))
