"""The steps of `lever run`: only what is needed is done, it says why, and a killed one goes on."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.items.task import Task
from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from lever_train.flow.pipeline import STATE, Outputs, Pipeline, Step
from lever_train.flow.steps import build_steps
from lever_train.learn.state import STATE as TRAINING_STATE
from lever_train.options.pipeline import (
    AnswererTable,
    DataTable,
    PipelineConfig,
)
from lever_train.options.train import Kind, ModelConfig, TrainConfig


class Chain:
    """Two steps that copy a file and count; ``calls`` says which ran, and whether it was begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, bool]] = []
        self.fails = False
        self.source = folder / "in.txt"
        self.source.write_text("1")

    def steps(self, size: int = 1) -> list[Step]:
        def first(known: Mapping[str, Outputs], begun: bool) -> Outputs:
            self.calls.append(("first", begun))
            out = self.folder / "first.txt"
            out.write_text(self.source.read_text() * size)
            return {"text": str(out), "paths": [str(out)]}

        def second(known: Mapping[str, Outputs], begun: bool) -> Outputs:
            self.calls.append(("second", begun))
            if self.fails:
                raise LeverError("no")
            return {"length": len(Path(known["first"]["text"]).read_text()), "paths": []}

        return [
            Step("first", first, {"size": {"x": size}}, {"source": self.source}),
            Step("second", second, {}, after=("first",)),
            Step("third", second, idle="nothing is asked of it"),
        ]

    @staticmethod
    def dies(known: Mapping[str, Outputs], begun: bool) -> Outputs:
        raise LeverError("killed")

    def run(self, size: int = 1, force: tuple[str, ...] = ()) -> tuple[dict[str, Outputs], str]:
        said: list[str] = []
        pipeline = Pipeline(self.folder, self.steps(size))
        return pipeline.run(said.append, force), "\n".join(said)


def test_an_unchanged_step_is_skipped_and_a_changed_one_says_why(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    outputs, said = chain.run()
    assert outputs["second"] == {"length": 1, "paths": []}
    assert "[first] not run yet" in said and "[third] nothing is asked of it" in said
    again, said = chain.run()
    assert again == outputs and said.count("skipped: unchanged") == 2
    _, said = chain.run(size=2)
    assert "[first] size.x: 1 → 2" in said and "[second] the step first changed" in said
    chain.source.write_text("2")
    _, said = chain.run(size=2)
    assert "[first] the source changed" in said
    assert chain.calls == [(name, False) for name in ("first", "second") * 3]


def test_a_lost_output_and_force_redo_a_step(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.run()
    (tmp_path / "first.txt").unlink()
    _, said = chain.run()
    assert "first.txt is gone" in said and "[second] skipped: unchanged" in said
    chain.calls.clear()
    _, said = chain.run(force=("second",))
    assert "[second] forced" in said and chain.calls == [("second", False)]
    with pytest.raises(UsageError, match="there is no such step"):
        chain.run(force=("fourth",))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "0 bytes, it made 1"), ("2", "its content is not what it made")],
)
def test_a_damaged_output_is_made_again(tmp_path: Path, content: str, message: str) -> None:
    chain = Chain(tmp_path)
    chain.run()
    (tmp_path / "first.txt").write_text(content)
    _, said = chain.run()
    assert f"[first] its output {tmp_path / 'first.txt'} is damaged: {message}" in said
    assert (tmp_path / "first.txt").read_text() == "1"
    assert "[first] skipped: unchanged" in chain.run()[1]


def test_a_failed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.fails = True
    with pytest.raises(LeverError):
        chain.run()
    chain.fails = False
    _, said = chain.run()
    assert "[first] skipped" in said and "[second] begun and not finished" in said
    assert chain.calls == [("first", False), ("second", False), ("second", True)]


def test_a_step_begun_with_other_parameters_starts_anew(tmp_path: Path) -> None:
    """Even where they are put back: what was begun may have replaced the outputs of the first."""
    chain = Chain(tmp_path)
    chain.run()
    begin = replace(chain.steps(size=3)[0], act=Chain.dies)
    with pytest.raises(LeverError, match="killed"):
        Pipeline(tmp_path, [begin]).run(print)
    chain.calls.clear()
    _, said = chain.run()
    assert "[first] begun and not finished, and starts anew: size.x: 3 → 1" in said
    assert chain.calls == [("first", False)]


def test_planning_changes_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    plan = Pipeline(tmp_path, chain.steps()).plan()
    assert [(p.step.name, p.verdict) for p in plan] == [
        ("first", "run"),
        ("second", "run"),
        ("third", "idle"),
    ]
    assert chain.calls == [] and not (tmp_path / STATE).exists()
    chain.source.unlink()
    with pytest.raises(LeverError, match="the source are not there"):
        Pipeline(tmp_path, chain.steps()).plan()


def test_a_guard_stops_the_pipeline_before_any_step(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.run()

    def guard() -> None:
        raise LeverError("not ours")

    steps = chain.steps()
    steps[1] = replace(steps[1], guard=guard)
    Pipeline(tmp_path, steps).plan()  # it is skipped: nothing is in danger
    chain.calls.clear()
    with pytest.raises(LeverError, match="not ours"):
        Pipeline(tmp_path, steps).run(print, force=("first", "second"))
    assert chain.calls == []


def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"first": ')
    with pytest.raises(LeverError, match="the record of the pipeline is damaged") as error:
        Pipeline(tmp_path, [])
    assert "delete it" in str(error.value.hint)


def _reads(steps: list[Step]) -> dict[str, set[Path]]:
    return {step.name: set(step.reads.values()) for step in steps}


def test_every_file_a_step_opens_is_in_its_key(tmp_path: Path) -> None:
    names = ("query_embeddings", "candidate_embeddings", "pool")
    held_out = ("eval_embeddings", "eval_pool", "eval_questions", "eval_annotations")
    files = {name: tmp_path / name for name in (*names, *held_out)}
    given = {"dataset": "d", "store": tmp_path, "out": tmp_path, "sql_dir": tmp_path / "sql"}
    table = DataTable.model_validate(given | files)
    for folder in ("views", "sql"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.sql").touch()
    views = {tmp_path / "views" / "views.sql", tmp_path / "sql" / "sql.sql"}
    answerer = AnswererTable(
        query_embeddings=tmp_path / "q.npy",
        candidate_embeddings=tmp_path / "c.npy",
        system_prompt=tmp_path / "p.txt",
    )
    config = PipelineConfig(data=table, answerer=answerer)
    found = _reads(build_steps(config, print, lambda done, total, note="": None))
    training = {files[name] for name in names}
    words = {tmp_path / "p.txt"}  # other words in the same file are another answerer
    assert found["sft"] == training
    assert found["beam"] == found["generate"] == training | words
    assert found["train"] == training | views and found["audit"] == views
    assert found["evaluate"] == {*files.values(), *words, tmp_path / "q.npy", tmp_path / "c.npy"}


@pytest.mark.slow
def test_an_edited_metric_of_ones_own_is_another_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = Task(metric="python:own_keyed.score")
    data = DataTable.model_validate({"dataset": "d", "store": tmp_path, "out": tmp_path})
    found = []
    for score in ("0.1", "0.2"):
        Path("own_keyed.py").write_text(f"def score(said, known):\n    return [{score}]\n")
        steps = build_steps(PipelineConfig(data=data, task=task), print, lambda *_: None)
        found.append({step.name: dict(step.parameters) for step in steps})
    changed = {name for name in found[0] if found[0][name] != found[1][name]}
    assert changed == {"beam", "generate", "evaluate"}


def test_sft_is_keyed_by_all_of_its_options_and_no_others() -> None:
    def parameters(section: str = "run", option: str = "seed", value: object = 0) -> object:
        train = {section: {option: value}}
        config = PipelineConfig.model_validate({"data": {"dataset": "d"}, "train": train})
        steps = build_steps(config, print, lambda done, total, note="": None)
        return next(step.parameters for step in steps if step.name == "sft")

    known = parameters()
    for section, option, value in (
        ("data", "split_ratio", 0.5),
        ("data", "order", "file"),
        ("run", "precision", "bf16"),
        ("run", "gradient_clip", 2.0),
        ("run", "seed", 1),
        ("model", "hidden", 8),
        ("sft", "warm_up", 0.1),
    ):
        assert parameters(section, option, value) != known, option
    for section, option, value in (
        ("rce", "epochs", 9),
        ("grpo", "epochs", 9),
        ("reward", "mode", "soft_only"),
        ("run", "threads", 1),
        ("run", "select_by", "loss"),
    ):
        assert parameters(section, option, value) == known, option


class _KilledError(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize(("kind", "is_idle"), [("static", False), ("gated", False), ("gru", True)])
def test_a_selector_that_no_legacy_code_has_is_not_converted(kind: Kind, is_idle: bool) -> None:
    train = TrainConfig(model=ModelConfig(selector=kind))
    config = PipelineConfig(data=DataTable(dataset="d"), train=train)
    steps = build_steps(config, print, lambda done, total, note="": None)
    convert = next(step for step in steps if step.name == "convert")
    assert (convert.idle is not None) == is_idle


def _until_sft(folder: Path, text: str = "", *, dies: bool = False) -> tuple[Outputs, list[str]]:
    """Run the steps up to SFT on the embedded world; with ``dies`` SFT is killed in epoch 2."""
    config = prepare_demo(DemoOptions(folder, WorldSpec(120, 40, 8)))[1]
    train = {"sft": {"epochs": 3}, "run": {"save_every": 3, "threads": 1}} | tomllib.loads(text)
    config = config.model_copy(update={"train": TrainConfig.model_validate(train)})
    said: list[str] = []

    def advance(done: float, total: float | None, note: str = "") -> None:
        if dies and note.startswith("sft 2/"):
            raise _KilledError

    pipeline = Pipeline(config.data.out, build_steps(config, said.append, advance)[:5])
    if dies:
        with pytest.raises(_KilledError):
            pipeline.run(said.append)
        return {}, said
    return pipeline.run(said.append)["sft"], said


@pytest.mark.long
def test_a_killed_sft_goes_on_though_rl_changed(tmp_path: Path) -> None:
    whole, _ = _until_sft(tmp_path / "whole")
    _until_sft(tmp_path / "d", dies=True)
    text = '[rce]\nepochs = 11\n[grpo]\nepochs = 2\n[reward]\nmode = "soft_only"'
    found, said = _until_sft(tmp_path / "d", text)
    assert "[sft] begun and not finished" in said
    assert any(line.startswith("resuming at") for line in said)
    assert Path(found["checkpoint"]).read_bytes() == Path(whole["checkpoint"]).read_bytes()


@pytest.mark.long
def test_a_killed_sft_starts_anew_where_it_changed(tmp_path: Path) -> None:
    _until_sft(tmp_path / "d", dies=True)
    _, said = _until_sft(tmp_path / "d", "[model]\nnum_layers = 2", dies=True)
    assert any("starts anew: model.num_layers: 1 → 2" in line for line in said)
    state = tmp_path / "d" / "out" / "sft" / TRAINING_STATE
    state.write_bytes(state.read_bytes()[:1000])
    _, said = _until_sft(tmp_path / "d", "[model]\nnum_layers = 2")
    assert any("the state cannot be read" in line and "anew" in line for line in said)


@pytest.mark.long
def test_rl_starts_from_the_best_epoch_of_sft(tmp_path: Path) -> None:
    found, _ = _until_sft(tmp_path, "[sft]\nepochs = 3\nlr = 0.03")
    folder = tmp_path / "out" / "sft"
    epochs = pl.read_parquet(folder / "metrics.parquet").filter(
        pl.col("step").is_null() & (pl.col("metric") == "val_loss")
    )
    best = epochs.sort("value")["epoch"][0]
    assert best < 3  # a rate this high learns the few beams by heart
    assert found["checkpoint"] == str(folder / f"sft_epoch{best}.pt") == found["paths"][0]
