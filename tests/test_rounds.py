"""`lever run` in rounds: answers where they can teach, judged on questions that taught nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.store.store import Store
from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from lever_train.evaluate.api import predict
from lever_train.flow.pipeline import Pipeline
from lever_train.flow.run import plan, run, summary, use_it
from lever_train.flow.steps import build_steps
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.options.pipeline import (
    AnswererTable,
    EvalTable,
    GenerateTable,
    PipelineConfig,
    RoundsTable,
    SftTable,
)
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store


def config_of(folder: Path, **rounds: Any) -> PipelineConfig:
    """The demo's questions without its RL data: two beams a query in the first round."""
    _, config = prepare_demo(DemoOptions(folder, world=WorldSpec(90, 20, 12), epochs=1))
    train = config.train.model_copy(
        update={
            "rce": config.train.rce.model_copy(update={"epochs": 1}),
            "grpo": config.train.grpo.model_copy(update={"epochs": 0}),
        }
    )
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"rl_data": (), "beam_data": ()}),
            "answerer": AnswererTable(),
            "sft": SftTable(enabled=False),
            "generate": GenerateTable(
                num_beams=2, temps=(), num_samples_per_temp=0, num_random=0, shot_num=1
            ),
            "rounds": RoundsTable(**{"count": 3, "budget": 360, "p": 0.9} | rounds),
            "train": train,
            "eval": EvalTable(shots=(1,)),
        }
    )


def done(config: PipelineConfig) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return run(config, said.append, lambda done, total, note="": None), said


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PipelineConfig, dict[str, Any], list[str]]:
    config = config_of(tmp_path_factory.mktemp("rounds"))
    outputs, said = done(config)
    return config, outputs, said


@pytest.mark.long
def test_data_that_teaches_the_held_out_questions_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    given = prepare_demo(DemoOptions(tmp_path / "given", world=WorldSpec(90, 20, 12), epochs=1))[1]
    data = given.data.model_copy(update={"beam_data": ()})
    with pytest.raises(LeverError, match="that rounds are judged on") as error:
        done(config.model_copy(update={"data": data}))
    assert "of the view held_out_fold" in error.value.message()
    assert not [r for r in Store.open(data.store).runs() if r.kind == "rollout"]


def test_sft_of_rounds_searches_no_held_out_question(tmp_path: Path) -> None:
    found = []
    for count in (0, 2):
        config = config_of(tmp_path, count=count).model_copy(update={"sft": SftTable()})
        steps = {s.name: s for s in build_steps(config, print, lambda *_: None)}
        found.append(steps["beam"].parameters.get("queries"))
    assert found == [None, "training_folds"]


@pytest.mark.long
def test_no_answer_is_paid_beyond_the_budget(
    ran: tuple[PipelineConfig, dict[str, Any], list[str]],
) -> None:
    config, outputs, _ = ran
    store = Store.open(config.data.store)
    runs = [r for r in store.runs() if r.kind == "rollout"]
    assert sum(r.details["report"]["candidates"] for r in runs) <= 360
    assert [outputs[f"generate-{k}"].get("run") for k in (1, 2)] == [r.run for r in runs][:2]
    result = Path(outputs["train"]["checkpoint"])
    rounds = [outputs[f"train-{k}"].get("checkpoint") for k in (1, 2, 3)]
    assert result.read_bytes() in [Path(path).read_bytes() for path in rounds if path]
    result.with_name("rce_epoch9.pt").write_bytes(b"of a longer training, before this one")
    assert dict(summary(config, outputs))["selector"] == str(result)
    assert str(result) in use_it(config, outputs)
    assert outputs["evaluate"]["run"] is not None


@pytest.mark.long
def test_the_held_out_fold_teaches_nothing(
    ran: tuple[PipelineConfig, dict[str, Any], list[str]],
) -> None:
    config, outputs, _ = ran
    con = connect(config.data.store)
    asked = "select count(*) from stg_candidates semi join {view} using (dataset, split, query_id)"
    assert con.execute(asked.format(view="held_out_fold")).fetchall() == [(0,)]
    assert con.execute(asked.format(view="training_folds")).fetchall()[0][0] > 0
    held = con.execute(
        "select count(*) from held_out_fold where split = ?", [config.data.train_split]
    ).fetchall()[0][0]
    board = json.loads(Path(outputs["judge-1"]["json"]).read_text())
    assert {row["n"] for row in board["rows"]} == {held}
    assert {row["selector"] for row in board["rows"]} >= {"round 1", "nearest", "random"}


@pytest.mark.long
def test_later_rounds_ask_what_was_not_tried(
    ran: tuple[PipelineConfig, dict[str, Any], list[str]],
) -> None:
    """Only queries whose candidates were all equal, and no pointer twice."""
    config, outputs, _ = ran
    store = Store.open(config.data.store)
    first, second = (
        pl.read_parquet(store.run(outputs[f"generate-{k}"]["run"]).table_files("candidates"))
        for k in (1, 2)
    )
    key = ["query_id", pl.col("pointer").list.eval(pl.element().cast(pl.String)).list.join(" ")]
    assert first.select(key).join(second.select(key), on=["query_id", "pointer"]).is_empty()
    spread = first.group_by("query_id").agg(pl.col("correct").n_unique())
    tied = set(spread.filter(pl.col("correct") == 1)["query_id"])
    assert set(second["query_id"]) <= tied


@pytest.mark.long
def test_rounds_end_where_one_adds_nothing(tmp_path: Path) -> None:
    """At a level no gain can reach the second round is the last, and the first is the result."""
    config = config_of(tmp_path, p=1e-9)
    outputs, said = done(config)
    assert outputs["judge-2"]["is_last"] and "run" not in outputs["generate-3"]
    first, result = (Path(outputs[step]["checkpoint"]) for step in ("train-1", "train"))
    assert first.read_bytes() == result.read_bytes()
    assert any("the rounds end" in line for line in said) and "round 1 is the result" in said
    again, said = done(config)
    assert again == outputs
    assert sum("skipped: unchanged" in line for line in said) >= 10


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_rounds(
    ran: tuple[PipelineConfig, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    config = config_of(tmp_path)

    class KilledError(Exception):
        pass

    steps = build_steps(config, lambda line: None, lambda done, total, note="": None)
    stop = next(i for i, step in enumerate(steps) if step.name == "train-2")

    def dies(*_: Any) -> Any:
        raise KilledError

    object.__setattr__(steps[stop], "act", dies)
    with pytest.raises(KilledError):
        Pipeline(config.data.out, steps).run(lambda line: None)
    outputs, _ = done(config)
    whole = ran[1]
    for k in (1, 2, 3):
        assert outputs[f"generate-{k}"].get("run") == whole[f"generate-{k}"].get("run")
        assert outputs[f"judge-{k}"]["is_last"] == whole[f"judge-{k}"]["is_last"]


@pytest.mark.long
def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rounds need a budget"):
        RoundsTable(count=2)
    config = config_of(tmp_path, budget=10)
    names = [line.step.name for line in plan(config)]
    assert names[5:9] == ["generate-1", "train-1", "judge-1", "generate-2"]
    with pytest.raises(UsageError, match=r"first round alone .* than the budget"):
        done(config)


@pytest.mark.slow
def test_rounds_are_asked_for_by_flags(tmp_path: Path) -> None:
    prepare_demo(DemoOptions(tmp_path, world=WorldSpec(60, 20, 12), epochs=1))
    words = ["run", "--config", tmp_path / "lever.toml", "--dry-run", "--json", "-"]
    steps = json.loads(lever(*words, "--rounds", 2, "--budget", 500).stdout)
    assert "generate-2" in {step["step"] for step in steps}
    refused = lever(*words, "--rounds", 2, check=False)
    assert refused.returncode == 2 and "rounds need a budget" in refused.stderr


@pytest.mark.slow
def test_folds_keep_equal_words_together(tmp_path: Path) -> None:
    texts = ["What is it?", "what  is it", "WHAT IS IT!", *(f"question {i}?" for i in range(200))]
    store = new_store(tmp_path)
    commit_examples(
        store,
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": i, "question": text}
            for i, text in enumerate(texts)
        ],
    )
    rows = connect(store.path).execute("select query_id, fold from folds order by 1").fetchall()
    folds = [fold for _, fold in rows]
    assert folds[0] == folds[1] == folds[2]
    assert set(folds) == {0, 1, 2, 3, 4}
    assert all(20 <= folds.count(k) <= 65 for k in range(5))


@pytest.mark.long
def test_the_likelier_half_of_the_tied_can_be_taught(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit_examples(
        store,
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": i,
             "question": f"question {i}?"}
            for i in range(100)
        ],
    )  # fmt: skip
    con = connect(store.path)
    asked = [q for (q,) in con.execute("select query_id from training_folds order by 1").fetchall()]
    mixed, often, seldom = asked[0], asked[1:11], asked[11:21]
    rows = [candidate(mixed, n, [500 + n], correct=n, score=float(n)) for n in (0, 1)]
    for queries, tries in ((often, 6), (seldom, 2)):
        rows += [
            candidate(q, n, [500 + n], correct=0, score=0.0) for q in queries for n in range(tries)
        ]
    commit(store, rows)
    found = connect(store.path).execute("select query_id from teachable order by 1").fetchall()
    assert [q for (q,) in found] == seldom


@pytest.mark.long
def test_an_evaluation_of_a_view_is_of_its_queries(
    ran: tuple[PipelineConfig, dict[str, Any], list[str]],
) -> None:
    config, outputs, _ = ran
    query = str(config.data.query_embeddings)
    questions = Questions(
        dataset="demo", split="train", queries="held_out_fold", query_embeddings=query,
        pool=config.data.pool,
    )  # fmt: skip
    request = EvalRequest(
        store=config.data.store, checkpoints=(Path(outputs["train"]["checkpoint"]),),
        questions=questions, contest=Contest(shots=(1,), oracle="no"),
    )  # fmt: skip
    con = connect(config.data.store)
    held = con.execute("select query_id from held_out_fold where split = 'train' order by 1")
    expected = [q for (q,) in held.fetchall()]
    assert predict(request).column("query_id").to_pylist() == expected
    with pytest.raises(UsageError, match="no query of this place"):
        predict(request.but(questions=questions.but(queries="beam_infoscore")))
