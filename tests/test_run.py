"""`lever run`: only what is needed is done, it says why, and the legacy form is what it was."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from lever_data.demo.files import WorldFiles, write_world
from lever_data.demo.world import WorldSpec, make_world
from lever_data.errors import LeverError, UsageError
from lever_data.readers.vectors import read_vectors
from lever_train.checkpoint import Progress, load_selector, save_v3
from lever_train.checkpoint import convert as convert_checkpoint
from lever_train.config import TrainConfig
from lever_train.history import make_selector
from lever_train.pipeline.config import (
    AnswererTable,
    DataTable,
    PipelineConfig,
    load_pipeline,
)
from lever_train.pipeline.demo import DemoOptions, prepare_demo
from lever_train.pipeline.legacy_environment import train_config
from lever_train.pipeline.legacy_names import (
    LegacyPaths,
    LegacyRun,
    choose_checkpoint,
    dataset_name,
    model_name,
    reward_suffix,
    sampler_name,
)
from lever_train.pipeline.pipeline import STATE, Outputs, Pipeline, Step
from lever_train.pipeline.similar import similar_pools
from lever_train.pipeline.steps import build_steps
from lever_train.selector import SelectorConfig
from lever_train.state import STATE as TRAINING_STATE
from tests.commands import lever

WORDS = (
    "vqa",
    "okvqa_local",
    "0",
    "query_img_text_icd_img_text",
    "rand_sampler",
    "qwen2.5_vl_3B",
)


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
    assert "[first] it has not run yet" in said and "[third] nothing is asked of it" in said
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
        query_embeddings=tmp_path / "q.npy", candidate_embeddings=tmp_path / "c.npy"
    )
    config = PipelineConfig(data=table, answerer=answerer)
    found = _reads(build_steps(config, print, lambda done, total, note="": None))
    training = {files[name] for name in names}
    assert found["sft"] == found["beam"] == found["generate"] == training
    assert found["train"] == training | views and found["audit"] == views
    assert found["evaluate"] == {*files.values(), tmp_path / "q.npy", tmp_path / "c.npy"}


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


def test_a_failed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.fails = True
    with pytest.raises(LeverError):
        chain.run()
    chain.fails = False
    _, said = chain.run()
    assert "[first] skipped" in said and "[second] it was begun and not finished" in said
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
    assert "[first] it was begun and not finished, and starts anew: size.x: 3 → 1" in said
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[data]\ndataset = "d"\nstor = "x"', "did you mean store?"),
        ('[data]\ndataset = "d"\n[train.rce]\nepoch = 1', "did you mean epochs?"),
        ("[data]\n", "data.dataset"),
        ("[data", "the config is not TOML"),
        ('[data]\ndataset = "d"\n[eval]\noracle = "maybe"', "eval.oracle"),
    ],
)
def test_a_bad_config_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "lever.toml").write_text(text)
    done = lever("run", "--config", tmp_path / "lever.toml", "--dry-run", check=False)
    assert done.returncode == 2 and message in done.stderr


def test_the_recipe_is_a_config() -> None:
    path = Path(__file__).resolve().parents[1] / "examples" / "okvqa_nearest.toml"
    config = load_pipeline(path)
    assert (config.generate.shot_num, config.generate.num_beams) == (1, 64)
    assert config.eval.shots == (1, 2, 3, 4) and config.data.eval_split == "val"


def test_paths_are_relative_to_the_config(tmp_path: Path) -> None:
    (tmp_path / "lever.toml").write_text('[data]\ndataset = "d"\nrl_data = ["a.json"]')
    config = load_pipeline(tmp_path / "lever.toml")
    assert config.data.rl_data == (tmp_path / "a.json",)
    assert config.data.store == tmp_path / "lever-store"


def test_pools_of_the_most_similar() -> None:
    torch.manual_seed(0)
    items = torch.randn(30, 4)
    pools = similar_pools(items, items, 5, leave_out_self=True)
    unit = items / items.norm(dim=1, keepdim=True)
    for query in range(30):
        order = (unit @ unit[query]).argsort(descending=True).tolist()
        assert pools[query].tolist() == [item for item in order if item != query][:5]
    with pytest.raises(UsageError, match="cannot be larger"):
        similar_pools(items, items, 30, leave_out_self=True)


def test_legacy_names() -> None:
    assert [model_name(m) for m in ("qwen2.5_vl_3B", "flamingo_3B", "a/b c.d")] == [
        "Qwen2_5-VL-3B-Instruct",
        "flamingo_3B",
        "a_b_c_d",
    ]
    assert [dataset_name(d) for d in ("okvqa_local", "vqav2_x", "gqa")] == ["okvqa", "vqav2", "gqa"]
    assert sampler_name("mix_sampler") == sampler_name("MixSampler") == "MixSampler"
    with pytest.raises(UsageError, match="unknown sampler"):
        sampler_name("best_sampler")
    assert [
        reward_suffix(*r)
        for r in (
            ("hard_plus_soft", 1, 1),
            ("hard_plus_soft", 2, 0.5),
            ("legacy", 1, 1),
            ("separated", 1, 1),
        )
    ] == ["", "_h2_s0.5", "_legacy", "_separated"]


def test_legacy_paths(tmp_path: Path) -> None:
    paths = LegacyPaths.of(LegacyRun.of(WORDS), tmp_path)
    base = tmp_path / "results" / "okvqa"
    assert paths.rl_data == (
        base / "generated_data" / "rl_data_RandSampler_Qwen2_5-VL-3B-Instruct.json"
    )
    assert paths.v2_checkpoint.relative_to(base / "model_cpk" / "v2").name == (
        "Qwen2_5_VL_3B_Instruct_RandSampler_infoscore_left_beam5_shot2_cand64_sample800_best.ckpt"
    )
    assert paths.v3_folder("_legacy") == (
        base / "model_cpk" / "v3_RandSampler_Qwen2_5-VL-3B-Instruct_legacy"
    )
    with pytest.raises(LeverError, match="there is no SFT checkpoint") as error:
        paths.find_v2()
    assert "--stage sft" in str(error.value.hint)
    paths.v2_folder.mkdir(parents=True)
    (paths.v2_folder / "other_RandSampler_x.ckpt").touch()
    assert paths.find_v2().name == "other_RandSampler_x.ckpt"


def test_legacy_environment() -> None:
    assert train_config({}, "cpu") == TrainConfig.model_validate(
        {"grpo": {"lr": 5e-6, "kl_beta_init": 0.15}}
    )
    found = train_config(
        {
            "RCE_EPOCHS": "3",
            "GRPO_EPOCHS": "2",
            "BATCH_SIZE": "4",
            "RCE_LR": "1e-3",
            "GRPO_LR": "1e-6",
            "KL_BETA": "0.3",
            "NUM_LAYERS": "2",
            "REWARD_MODE": "separated",
            "HARD_WEIGHT": "2",
            "SOFT_WEIGHT": "0.5",
            "RCE_USE_NORMALIZED_REWARD": "true",
            "SKIP_FALLBACK_REWARD": "True",
            "FREEZE_BACKBONE_IN_GRPO": "1",
        },
        "cpu",
    )
    assert (found.rce.epochs, found.rce.lr, found.rce.use_normalized_reward) == (3, 1e-3, True)
    grpo = found.grpo
    assert (grpo.epochs, grpo.lr, grpo.kl_beta_init, grpo.freeze_backbone) == (2, 1e-6, 0.3, True)
    assert (found.model.num_layers, found.run.batch_size, found.data.skip_fallback) == (2, 4, True)
    assert (found.reward.mode, found.reward.hard_weight) == ("separated", 2)
    for name, value in (("RCE_EPOCHS", "two"), ("BATCH_SIZE", "1.5"), ("KL_BETA", "x")):
        with pytest.raises(UsageError, match=name):
            train_config({name: value}, "cpu")
    with pytest.raises(UsageError, match="neither true nor false"):
        train_config({"SKIP_FALLBACK_REWARD": "perhaps"}, "cpu")


def test_the_checkpoint_that_counts(tmp_path: Path) -> None:
    for name in ("rce_epoch2", "rce_epoch10", "grpo_epoch1"):
        (tmp_path / f"{name}.pt").touch()
    assert choose_checkpoint(tmp_path, 0).name == "rce_epoch10.pt"
    assert choose_checkpoint(tmp_path, 1).name == "grpo_epoch1.pt"
    for path in tmp_path.glob("*_epoch*.pt"):
        path.unlink()
    with pytest.raises(LeverError, match="there is no checkpoint"):
        choose_checkpoint(tmp_path, 0)
    (tmp_path / "older.pt").touch()
    assert choose_checkpoint(tmp_path, 1).name == "older.pt"


def _use(output: str) -> int:
    """Run the command a run ends with, as a shell would; how many questions it answered."""
    (line,) = [line for line in output.splitlines() if line.startswith("use it: ")]
    words = shlex.split(line.removeprefix("use it: "))
    assert words.pop(0) == "lever"
    lever(*words)
    return len(Path("picks.jsonl").read_text().splitlines())


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LegacyPaths:
    """A folder with everything the legacy form expects, made from a small world."""
    files: WorldFiles = write_world(make_world(WorldSpec(120, 40, 10)), tmp_path / "world")
    paths = LegacyPaths.of(LegacyRun.of(WORDS), tmp_path)
    paths.rl_data.parent.mkdir(parents=True)
    paths.rl_data.write_bytes(files.rl_data.read_bytes())
    vectors = torch.from_numpy(read_vectors(files.embeddings("train"), "npy").copy())
    paths.embeddings("query").parent.mkdir(parents=True)
    for role in ("query", "candidate"):
        torch.save(vectors, paths.embeddings(role))
    paths.v2_folder.mkdir(parents=True)
    selector = make_selector(SelectorConfig(dim=96, hidden=32))
    save_v3(tmp_path / "sft.pt", selector, Progress(1, "rce", 0.1, {}))
    convert_checkpoint(tmp_path / "sft.pt", paths.v2_checkpoint)
    monkeypatch.chdir(tmp_path)
    return paths


def test_the_legacy_form_runs(legacy: LegacyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RCE_EPOCHS", "1"), ("GRPO_EPOCHS", "1"), ("BATCH_SIZE", "16")):
        monkeypatch.setenv(name, value)
    command = ["run", *WORDS, "--device", "cpu", "--answerer", "nearest"]
    plan = lever(*command, "--dry-run").stdout
    for line in (
        "okvqa_local → okvqa",
        "rand_sampler → RandSampler",
        "qwen2.5_vl_3B → Qwen2_5-VL-3B-Instruct",
        "mode: RCE + GRPO (1 + 1 epochs)",
    ):
        assert line in plan
    assert not (legacy.results / "lever-store").exists()
    done = lever(*command)
    folder = legacy.v3_folder("")
    for name in ("rce_epoch1.pt", "grpo_epoch1.pt", "grpo_epoch1_v2format.ckpt"):
        assert (folder / name).exists()
        load_selector(folder / name)
    assert "[RCE] epoch 1/1: loss " in done.stderr and "[GRPO] epoch 1/1: loss " in done.stderr
    assert "grpo_epoch1.pt" in done.stdout
    assert _use(done.stdout) == 120  # the train split: nothing of another is known
    assert lever(*command).stderr.count("skipped: unchanged") == 5
    assert json.loads(lever(*command, "--dry-run", "--json").stdout)[0]["verdict"] == "skip"


def test_checkpoints_of_another_trainer_are_left_alone(
    legacy: LegacyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCE_EPOCHS", "1")
    monkeypatch.setenv("BATCH_SIZE", "32")
    folder = legacy.v3_folder("")
    folder.mkdir(parents=True)
    for name in ("rce_epoch5.pt", "grpo_epoch3.pt", "rce_epoch5_v2format.ckpt"):
        (folder / name).write_bytes(b"another's")
    for words in (("--dry-run",), ()):
        done = lever("run", *WORDS, "--device", "cpu", *words, check=False)
        assert done.returncode == 1
        assert "did not make: rce_epoch5.pt, grpo_epoch3.pt, rce_epoch5_v2format" in done.stderr
        assert "move them away" in done.stderr
    assert {path.read_bytes() for path in folder.iterdir()} == {b"another's"}
    assert not (legacy.results / "lever-store").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("caption", *WORDS[1:]), "only the task vqa is supported"),
        (WORDS[:4], "the legacy form takes 6 words"),
        ((*WORDS[:4], "a_sampler", WORDS[5]), "unknown sampler"),
    ],
)
def test_bad_legacy_words(words: tuple[str, ...], message: str) -> None:
    done = lever("run", *words, "--dry-run", check=False)
    assert done.returncode == 2 and message in done.stderr


def test_missing_legacy_files_say_what_makes_them(
    legacy: LegacyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    legacy.v2_checkpoint.unlink()
    done = lever("run", *WORDS, "--device", "cpu", check=False)
    assert done.returncode == 1 and "there is no SFT checkpoint (v2)" in done.stderr
    legacy.rl_data.unlink()
    done = lever("run", *WORDS, "--device", "cpu", check=False)
    assert done.returncode == 1 and "lever generate" in done.stderr
    assert "rand_sampler → RandSampler" in done.stdout


def test_without_a_config_it_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lever("run", check=False)
    assert done.returncode == 2 and "there is no lever.toml here" in done.stderr


def test_from_questions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No RL data, no beams, no pools, no checkpoint: the pipeline makes all of them."""
    monkeypatch.chdir(tmp_path)
    files = write_world(make_world(WorldSpec(120, 40, 10)), tmp_path / "world")
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "mine.sql").write_text("select * from all_candidates")
    config = tmp_path / "lever.toml"
    config.write_text(
        '[data]\ndataset = "demo"\n'
        f'questions = "{files.questions("train")}"\nannotations = "{files.annotations("train")}"\n'
        f'eval_questions = "{files.questions("val")}"\n'
        f'eval_annotations = "{files.annotations("val")}"\n'
        f'query_embeddings = "{files.embeddings("train")}"\n'
        f'eval_embeddings = "{files.embeddings("val")}"\n'
        'sql_dir = "views"\n[train.data]\nview = ["mine"]\n'
        "[pool]\nsize = 8\n[beam]\nqueries = 20\n[train.sft]\nepochs = 1\n"
        "[train.rce]\nepochs = 1\n[train.run]\nbatch_size = 16\n[eval]\nshots = [1, 2]\n"
    )
    outputs = json.loads(lever("run", "--config", config, "--json").stdout)
    assert outputs["beam"]["run"].startswith("beam-demo-train-")
    assert outputs["generate"]["run"].startswith("rollout-demo-train-")
    assert outputs["sft"]["checkpoint"].endswith("sft/sft_epoch1.pt")
    found = json.loads(Path(outputs["evaluate"]["json"]).read_text())
    assert {row["selector"] for row in found["rows"]} == {
        "zero_shot", "random", "nearest", "oracle", "sft", "rce",
    }  # fmt: skip
    plan = json.loads(lever("run", "--config", config, "--dry-run", "--json").stdout)
    verdicts = {item["step"]: item["verdict"] for item in plan}
    assert verdicts.pop("embed") == "idle" and set(verdicts.values()) == {"skip"}
    assert _use(lever("run", "--config", config).stdout) == 40
    gated = config.read_text() + '[audit]\nfail_on = ["queries > 1"]\n'
    config.write_text(gated)
    stopped = lever("run", "--config", config, check=False)
    assert stopped.returncode == 1 and "queries" in stopped.stderr
    assert "[train]" not in stopped.stderr


class _KilledError(Exception):
    """Raised in place of a kill."""


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


def test_a_killed_sft_goes_on_though_rl_changed(tmp_path: Path) -> None:
    whole, _ = _until_sft(tmp_path / "whole")
    _until_sft(tmp_path / "d", dies=True)
    text = '[rce]\nepochs = 11\n[grpo]\nepochs = 2\n[reward]\nmode = "soft_only"'
    found, said = _until_sft(tmp_path / "d", text)
    assert "[sft] it was begun and not finished" in said
    assert any(line.startswith("resuming at") for line in said)
    assert Path(found["checkpoint"]).read_bytes() == Path(whole["checkpoint"]).read_bytes()


def test_a_killed_sft_starts_anew_where_it_changed(tmp_path: Path) -> None:
    _until_sft(tmp_path / "d", dies=True)
    _, said = _until_sft(tmp_path / "d", "[model]\nnum_layers = 2", dies=True)
    assert any("starts anew: model.num_layers: 1 → 2" in line for line in said)
    state = tmp_path / "d" / "out" / "sft" / TRAINING_STATE
    state.write_bytes(state.read_bytes()[:1000])
    _, said = _until_sft(tmp_path / "d", "[model]\nnum_layers = 2")
    assert any("the state cannot be read" in line and "anew" in line for line in said)


def test_rl_starts_from_the_best_epoch_of_sft(tmp_path: Path) -> None:
    found, _ = _until_sft(tmp_path, "[sft]\nepochs = 3\nlr = 0.03")
    folder = tmp_path / "out" / "sft"
    epochs = pl.read_parquet(folder / "metrics.parquet").filter(
        pl.col("step").is_null() & (pl.col("metric") == "val_loss")
    )
    best = epochs.sort("value")["epoch"][0]
    assert best < 3  # a rate this high learns the few beams by heart
    assert found["checkpoint"] == str(folder / f"sft_epoch{best}.pt") == found["paths"][0]
