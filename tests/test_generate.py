"""`lever generate`: rows that say where they come from; resumed, shared out, never paid twice."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lever_cli.__main__ import main

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.vqa_metric import METRIC_VERSION, vqa_accuracy
from lever_data.report.check import check
from lever_data.store.store import Store
from lever_train.inputs.pools import SharedPool
from lever_train.options.rollout import Execution, Request
from lever_train.options.train import ModelConfig
from lever_train.rollout.ask import Tally
from lever_train.rollout.generate import _probe, commit, forecast, generate
from lever_train.rollout.job import new_asker, shard_folder
from lever_train.rollout.resolve import resolve
from lever_train.rollout.work import make_shard
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.kinds import make_selector
from tests.rollouts import World, make_world, rows


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def lever(*argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    return int(end.value.code or 0)


@pytest.mark.slow
def test_rows_hold_everything_and_agree_with_the_metric(world: World) -> None:
    outcome = generate(world.request())
    found = rows(outcome.run)
    assert outcome.report.candidates == len(found) == outcome.report.file
    assert (outcome.report.fallback, outcome.report.failed) == (0, 0)
    assert [(r["query_id"], r["candidate"]) for r in found] == sorted(
        (r["query_id"], r["candidate"]) for r in found
    )
    truth = _answers(world)
    accuracy = vqa_accuracy([r["answer"] for r in found], [truth[r["query_id"]] for r in found])
    pool = np.load(world.pool)
    for row, expected in zip(found, accuracy.tolist(), strict=True):
        assert row["score"] == expected
        assert row["correct"] == int(expected > 0)
        assert row["shot_num"] == len(row["pointer"]) == 2
        assert [pool[row["query_id"]][p] for p in row["pointer_pos"]] == row["pointer"]
        assert row["eval_mode"] == "file" and row["eval_split"] == "train"
        assert row["eval_failed"] is False and row["error"] is None
        assert (row["scorer"], row["policy"]) == ("nearest", "similarity")
        assert row["metric"] == METRIC_VERSION
        assert 0 <= row["expected_score"] <= 1
        assert row["similarity"] == max(row["token_f1"], row["edit_sim"])
        extra = json.loads(row["extra"])
        assert set(extra) == {"generation", "logprob_t1", "prompt_sha256"}
        assert (row["temperature"] is None) == (row["gen_method"] != "sample")
        assert (row["beam_rank"] is None) == (row["gen_method"] != "beam")
        assert (row["logprob_score"] is None) == (row["gen_method"] in ("random", "retrieval"))
    methods = Counter(r["gen_method"] for r in found if r["query_id"] == 0)
    assert methods["beam"] == 5
    queries = rows(outcome.run, "queries")
    assert [q["query_id"] for q in queries] == list(range(world.queries))
    assert queries[3]["candidate_pool"] == pool[3].tolist()
    assert queries[3]["gt_answers"] == truth[3]


@pytest.mark.slow
def test_the_expected_accuracy_is_that_of_the_mixture(world: World) -> None:
    found = rows(generate(world.request()).run)
    truth, vectors = _answers(world), np.load(world.embeddings)
    for row in found[::9]:
        weights = np.exp(vectors[row["pointer"]].astype(float) @ vectors[row["query_id"]] / 0.05)
        weights /= weights.sum()
        expected = sum(
            w * Counter(truth[e])[a] / 10 * min(n / 3, 1)
            for a, n in Counter(truth[row["query_id"]]).items()
            for w, e in zip(weights, row["pointer"], strict=True)
        )
        assert row["expected_score"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.long
def test_the_question_alone_is_a_candidate_where_it_is_asked_for(world: World) -> None:
    """Its run is another; a run without it has the id that it had before there was the option."""
    recipe = {"num_beams": 2, "temps": (), "num_random": 0}
    plain, more = (generate(world.request(**recipe, zero_shot=zero)) for zero in (False, True))
    assert plain.run is not None and more.run is not None
    assert "zero_shot" not in plain.run.parameters["recipe"]
    found = [row for row in rows(more.run) if row["shot_num"] == 0]
    assert [row["query_id"] for row in found] == list(range(world.queries))
    assert {(row["gen_method"], len(row["pointer"])) for row in found} == {("empty", 0)}
    assert len(rows(more.run)) == len(rows(plain.run)) + world.queries
    assert all(row["eval_mode"] == "file" for row in found)
    assert not check(Store(world.store)).problems


@pytest.mark.long
def test_a_policy_that_ends_pointers_stores_them_as_they_are(world: World, tmp_path: Path) -> None:
    """Empty and short pointers are rows as others: asked, scored, found again, well-formed."""
    torch.manual_seed(0)
    selector = make_selector(16, ModelConfig(selector="stop", hidden=8))
    steps, token = selector.state_dict()["step_emb.weight"], selector.state_dict()["stop_token"]
    steps[1:] = 1e4 * token  # no second demonstration
    save_v3(tmp_path / "stop.pt", selector, Progress(1, "rce", 0.1, {}))
    request = world.request(checkpoint=tmp_path / "stop.pt", num_beams=13, temps=(), num_random=0)
    found = rows(generate(request).run)
    assert len(found) == 40 * 13 and {row["shot_num"] for row in found} >= {0, 1}
    assert all(len(row["pointer"]) == row["shot_num"] for row in found)
    assert all(row["score"] is not None for row in found)
    assert not check(Store(world.store)).problems


@pytest.mark.long
def test_a_policy_that_reads_features_proposes_by_them(world: World, tmp_path: Path) -> None:
    """It is made to follow the vote alone, and proposes what the pool votes for most."""
    names = ("vote",)
    selector = make_selector(
        16, ModelConfig(selector="features", hidden=1, pair_features=names), num_features=6
    )
    state = {name: torch.zeros_like(values) for name, values in selector.state_dict().items()}
    state["feature_std"] += 1
    state["pair.weight"][0, 3] = 10.0  # behind the three that the selector computes itself
    state["score.weight"][0, 0] = 1.0
    selector.load_state_dict(state)
    save_v3(tmp_path / "vote.pt", selector, Progress(1, "dense", 0.1, {}))
    request = world.request(
        checkpoint=tmp_path / "vote.pt", shot_num=1, num_beams=1, temps=(), num_random=0
    )
    found = {row["query_id"]: row["pointer"][0] for row in rows(generate(request).run)}
    con = connect(world.store)
    best = con.execute(
        "select query_id, example_id from features where name = 'vote_05' "
        "qualify value = max(value) over (partition by query_id)"
    ).fetchall()
    assert len(found) == 40 and set(found.items()) <= set(best)


@pytest.mark.slow
def test_the_same_request_again_is_the_same_run(world: World) -> None:
    first = generate(world.request())
    again = generate(world.request(shard_size=3))
    assert again.already and again.run is not None and first.run is not None
    assert again.run.run == first.run.run
    assert again.report == first.report
    assert not list((world.store / "jobs").iterdir())  # its shards are in the run


@pytest.mark.long
def test_shard_size_and_parts_do_not_change_a_byte(world: World) -> None:
    whole = generate(world.request()).run
    assert whole is not None
    Store.open(world.store).remove(whole.run)
    for part in range(3):
        outcome = generate(world.request(shard_size=5), Execution(shard=f"{part}/3"))
        assert (outcome.run is None) == (part < 2)
        assert part == 2 or outcome.missing > 0
    assert outcome.run is not None
    assert outcome.run.files == whole.files


def _in_a_process(world: World, at_once: Any, asked: Any) -> None:
    at_once.wait(60)
    outcome = generate(world.request(shard_size=4))
    asked.put((outcome.tally.asked, outcome.run.run if outcome.run else None))


@pytest.mark.long
def test_processes_share_a_job_and_pay_once(world: World) -> None:
    whole = generate(world.request())
    assert whole.run is not None
    Store.open(world.store).remove(whole.run.run)
    shutil.rmtree(world.store / "cache")
    context = multiprocessing.get_context("spawn")
    at_once, asked = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_in_a_process, args=(world, at_once, asked)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    results = [asked.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sum(count for count, _ in results) == whole.tally.asked
    assert whole.run.run in {run for _, run in results}
    (run,) = Store.open(world.store).runs()
    assert run.files == whole.run.files
    assert not list((world.store / "jobs").iterdir())


@pytest.mark.slow
def test_who_commits_too_late_finds_the_run_of_the_other(world: World) -> None:
    """Another process committed and deleted the shards while this one was about to."""
    made = generate(world.request())
    job = resolve(world.request())
    assert commit(job, shard_folder(job)) == made.run
    assert made.run is not None
    job.store.remove(made.run.run)
    with pytest.raises(LeverError, match="finished shards of this job vanished"):
        commit(job, shard_folder(job))


@pytest.mark.slow
def test_a_finished_answer_is_never_paid_again(world: World) -> None:
    first = generate(world.request())
    assert first.tally.asked > 0
    # another seed: beams are the same questions, and so are many samples in so small a pool
    more = generate(world.request(seed=1))
    seen = {(r["query_id"], *r["pointer"]) for r in rows(first.run)}
    new = [r for r in rows(more.run) if (r["query_id"], *r["pointer"]) not in seen]
    assert more.tally.asked == len(new) > 0
    assert more.tally.hits == more.report.candidates - len(new)
    # the same prompts under other generation parameters are other questions
    assert Tally() != first.tally


@pytest.mark.slow
def test_a_dry_run_says_exactly_what_would_be_asked(world: World) -> None:
    request = world.request(shots=(1, 2))
    told = forecast(request)
    assert not (world.store / "cache").exists()
    outcome = generate(request)
    assert told.asked == outcome.tally.asked
    assert told.candidates == outcome.report.candidates
    assert outcome.run is not None and told.run == outcome.run.run
    assert forecast(request).already
    other = world.request(shots=(1, 2), seed=1)
    assert forecast(other).asked == generate(other).tally.asked


@pytest.mark.long
def test_prefixes_are_scored(world: World) -> None:
    found = rows(generate(world.request(shots=(1, 2, 3, 4), num_random=2)).run)
    assert {r["shot_num"] for r in found} == {4}
    ones = {
        (r["query_id"], *r["pointer"]): r for r in rows(generate(world.request(shot_num=1)).run)
    }
    checked = 0
    for row in found:
        assert [s["shot"] for s in row["shot_scores"]] == [1, 2, 3, 4]
        last = row["shot_scores"][-1]
        assert last["score"] == row["score"]
        assert last["expected_score"] == row["expected_score"]
        alone = ones.get((row["query_id"], row["pointer"][0]))
        if alone is not None:
            checked += 1
            assert row["shot_scores"][0]["answer"] == alone["answer"]
    assert checked > 50
    middle = rows(generate(world.request(shots=(1,), shot_num=3)).run)
    assert {tuple(s["shot"] for s in r["shot_scores"]) for r in middle} == {(1,)}


@pytest.mark.long
def test_a_run_killed_between_shards_goes_on(world: World) -> None:
    request = world.request()
    job = resolve(request)
    folder = shard_folder(job)
    asker = new_asker(job)
    list(folder.make_all([0, 3], lambda i: make_shard(job, job.shards[i]), asker))
    half = folder.missing()
    outcome = generate(request)
    assert outcome.tally.wanted < outcome.report.candidates  # two shards were there
    assert half == [1, 2, 4]
    Store.open(world.store).remove(outcome.run.run if outcome.run else "")
    fresh = generate(world.request())
    assert fresh.run is not None and outcome.run is not None
    assert fresh.run.files == outcome.run.files


@pytest.mark.long
def test_fallback_is_said_and_counted(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    noted = json.loads(world.annotations.read_text())
    kept = noted["annotations"][6:]
    world.annotations.write_text(json.dumps({"annotations": kept}))
    with pytest.raises(LeverError, match=r"6 of 40 queries have no annotation; at query 0"):
        generate(world.request())
    _ingest_whole(world, noted)
    outcome = generate(world.request(allow_fallback=True))
    found = rows(outcome.run)
    modes = Counter(r["eval_mode"] for r in found)
    assert modes["fallback"] == sum(r["query_id"] < 6 for r in found) == outcome.report.fallback
    assert {r["query_id"] for r in found if r["eval_mode"] == "fallback"} == set(range(6))
    assert (outcome.notices and "15." in outcome.notices[0]) or "14." in outcome.notices[0]
    capfd.readouterr()
    assert lever(*world.argv("--allow-fallback", "--seed", "9")) == 0
    shown = capfd.readouterr()
    assert "WARNING" in shown.err and "fallback 1" in shown.out


@pytest.mark.slow
def test_without_annotations_there_is_no_score(world: World) -> None:
    with pytest.raises(LeverError, match="the store has no examples of this split"):
        generate(world.request(questions=None, annotations=None))
    words = ["ingest", world.questions, "--store", world.store, "--dataset", "d"]
    assert lever(*map(str, [*words, "--split", "train"])) == 0
    with pytest.raises(LeverError, match="40 of 40 queries have no annotation") as caught:
        generate(world.request(questions=None, annotations=None))
    assert "--allow-fallback" in str(caught.value.hint)


@pytest.mark.long
def test_what_was_ingested_is_official(world: World) -> None:
    """The files need not be named again; the rows are those of the same files named."""
    named = generate(world.request())
    _ingest_whole(world, json.loads(world.annotations.read_text()))
    stored = generate(world.request(questions=None, annotations=None, allow_fallback=True, seed=1))
    assert {r["eval_mode"] for r in rows(stored.run)} == {"file"}
    again = generate(world.request(questions=None, annotations=None))
    assert again.run is not None and named.run is not None
    assert again.run.files == named.run.files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": "a", "from_view": "b"}, "only one of --queries, --target-view"),
        ({"budget": 5}, "--budget goes with --target-view"),
        ({"shots": (1, 5)}, "less than or equal to 4; at Request.shots"),
        ({"shots": (3,), "shot_num": 2}, "longer prefixes than --shot-num"),
        ({"temps": (1.0, 0.0)}, "greater than 0; at Recipe.temps"),
        ({"temps": (1.0, 1.0)}, "distinct temperatures above 0"),
        ({"num_beams": -1}, "greater than or equal to 0; at Recipe.num_beams"),
        ({"num_beams": 0, "temps": (), "num_random": 0}, "nothing to propose"),
        ({"limit": 0}, "greater than or equal to 1; at Which.limit"),
        ({"annotations": None}, "--questions and --annotations go together"),
        ({"query_embeddings": None}, "proposals need embeddings"),
        ({"spec": "gpt"}, "unknown answerer"),
        ({"queries": "nothing_here"}, "there is no such view"),
        ({"spec": "openai:http://127.0.0.1:9/v1", "model": "m"}, "looks at images"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    world: World, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(world.request(**changes))


def test_an_item_without_an_image_stops_a_task_that_shows_images(world: World) -> None:
    asked = json.loads(world.questions.read_text())
    for question in asked["questions"]:
        del question["image_id"]
    world.questions.write_text(json.dumps(asked))
    world.images.mkdir()
    shown = {"spec": "openai:http://127.0.0.1:9/v1", "model": "m", "image_root": world.images}
    with pytest.raises(LeverError, match="have no image; at item 0 of d/train, question 1000"):
        generate(world.request(**shown))


@pytest.mark.long
def test_data_that_does_not_fit_is_named(world: World) -> None:
    vectors = np.load(world.embeddings)
    short = world.folder / "short.npy"
    np.save(short, vectors[:30])
    with pytest.raises(
        LeverError, match=r"have 30 rows, none for a query; at .*short\.npy, query 39"
    ):
        generate(world.request(query_embeddings=str(short)))
    other = world.folder / "other.json"
    asked = json.loads(world.questions.read_text())
    generate(world.request())
    _ingest_whole(world, json.loads(world.annotations.read_text()))
    asked["questions"].reverse()  # the same questions, found by their ids
    other.write_text(json.dumps(asked))
    generate(world.request(questions=other))
    asked["questions"][-1]["question"] = "and what is this?"
    other.write_text(json.dumps(asked))
    with pytest.raises(LeverError, match="a question is another one; at query 0 of d/train"):
        generate(world.request(questions=other, seed=2))
    with pytest.raises(LeverError, match="the file holds no questions"):
        generate(world.request(questions=world.annotations))


@pytest.mark.slow
def test_the_command_line_as_written(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    words = "--answerer nearest --num-beams 5 --temps 1.0,1.3 --num-samples-per-temp 2"
    more = [*words.split(), *["--num-random", "1", "--shot-num", "2", "--seed", "0"]]
    assert lever(*world.argv(*more, "--dry-run")) == 0
    assert "answers would be asked" in capfd.readouterr().out
    assert lever(*world.argv(*more)) == 0
    told = capfd.readouterr().out
    assert "file 100.0%, fallback 0.0%, failed 0.0%" in told
    assert lever(*world.argv("--json", "-")) == 0  # the values above are the defaults
    again = json.loads(capfd.readouterr().out)
    assert again["already"] and again["run"] in told
    assert lever(*world.argv("--shots", "1,two")) == 2
    assert "unable to parse string as an integer; at --shots; value 'two'" in capfd.readouterr().err
    assert lever(*world.argv("--shard", "3/3", "--seed", "4")) == 2
    assert "--shard is i/n with 0 <= i < n" in capfd.readouterr().err


@pytest.mark.slow
def test_without_a_pool_every_example_of_the_split_may_be_shown(world: World) -> None:
    """Not those alone that pointers of the store happen to name."""
    first = generate(world.request(limit=2, num_retrieval=5, pool=None))
    named = {e for r in rows(first.run) for e in r["pointer"]}
    assert len(named) < world.queries
    job = resolve(world.request(pool=None))
    assert isinstance(job.pool, SharedPool) and job.pool.ids.tolist() == list(range(world.queries))


@pytest.mark.slow
def test_view_and_run_names_travel_safely(world: World) -> None:
    generate(world.request())
    with pytest.raises(UsageError, match="no such view"):
        generate(world.request(queries='x"; drop view candidates; --'))


def test_a_full_store_folder_says_so(world: World) -> None:
    request: Request = world.request()
    store = Store.create(world.store)
    (store.path / "jobs").write_text("in the way")
    with pytest.raises(LeverError, match=r"cannot be written"):
        generate(request)


def _answers(world: World) -> list[list[str]]:
    noted = json.loads(world.annotations.read_text())["annotations"]
    return [[said["answer"] for said in a["answers"]] for a in noted]


def _ingest_whole(world: World, noted: dict[str, Any]) -> None:
    """Put all questions with all annotations into the store."""
    full = world.folder / "full.json"
    full.write_text(json.dumps(noted))
    words = ["ingest", world.questions, full, "--store", world.store]
    assert lever(*map(str, [*words, "--dataset", "d", "--split", "train"])) == 0


def test_the_first_prompts_are_not_asked_of_a_shard_that_another_makes(world: World) -> None:
    """That other has asked them already, and its answers are not written yet."""
    job = resolve(world.request())
    with shard_folder(job).place.claimed("shard-00000", wait=False):
        assert _probe(job, Execution()).asked == 0
    assert _probe(job, Execution()).asked == 3
