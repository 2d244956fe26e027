"""`lever run`: its config, its library, and the legacy form, which is what it was."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.readers.vectors import read_vectors
from lever_data.store.schema import EXAMPLES
from lever_data.store.store import RunSpec, Store
from lever_demo.files import WorldFiles, write_world
from lever_demo.world import WorldSpec, make_world
from lever_train.flow.legacy import LegacyCall, sources
from lever_train.flow.legacy_environment import (
    not_understood,
    reward_suffix,
    rl_reader,
    train_config,
)
from lever_train.flow.legacy_names import (
    LegacyPaths,
    LegacyRun,
    choose_checkpoint,
    dataset_name,
    model_name,
    sampler_name,
)
from lever_train.flow.similar import similar_pools
from lever_train.flow.steps import build_steps
from lever_train.options.pipeline import DataTable, PipelineConfig, load_pipeline
from lever_train.options.resolve import resolve
from lever_train.options.train import ModelConfig, TrainConfig
from lever_train.selector.checkpoint import Progress, load_selector, save_v3
from lever_train.selector.checkpoint import convert as convert_checkpoint
from lever_train.selector.kinds import make_selector
from tests.commands import lever
from tests.encoders import tiny_clip
from tests.stores import table

QUERIES, HELD_OUT = 60, 20  # of the legacy form's world
ROLES = ("query", "candidate")
WORDS = (
    "vqa",
    "okvqa_local",
    "0",
    "query_img_text_icd_img_text",
    "rand_sampler",
    "qwen2.5_vl_3B",
)


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
    assert dataset_name("OKVQA_local") == "okvqa"
    assert model_name("qwen2_5_vl_3B") == model_name("qwen2.5_vl_3B")


@pytest.mark.parametrize(
    ("environment", "suffix"),
    [
        ({}, ""),
        ({"HARD_WEIGHT": "1.0", "SOFT_WEIGHT": "1"}, ""),
        ({"HARD_WEIGHT": "2", "SOFT_WEIGHT": "0.5"}, "_h2_s0.5"),
        ({"HARD_WEIGHT": "2.0"}, "_h2.0_s1.0"),  # as written, and the script's own 1.0
        ({"REWARD_MODE": "legacy", "HARD_WEIGHT": "2"}, "_legacy"),
        ({"REWARD_MODE": "separated"}, "_separated"),
    ],
)
def test_the_reward_names_the_folder_as_it_is_written(
    environment: dict[str, str], suffix: str
) -> None:
    assert reward_suffix(environment) == suffix


def test_rl_data_is_written_for_the_state_whose_words_are_used() -> None:
    assert rl_reader({"RCE_EPOCHS": "5", "HARD_WEIGHT": "2"}) == "notes"
    assert rl_reader({"REL_WEIGHT": "0.1"}) == rl_reader({"RL_DATA_PATH": "x"}) == "newest"


def test_every_variable_of_the_script_counts_or_is_named() -> None:
    found = train_config(
        {"REQUIRE_POSITIVE_QUERY": "true", "REL_WEIGHT": "0.3", "RCE_USE_RAW_REWARD": "false"},
        "cpu",
    )
    assert found.data.require_positive_query and found.reward.rel_weight == 0.3
    assert found.rce.use_normalized_reward
    both = {"RCE_USE_RAW_REWARD": "true", "RCE_USE_NORMALIZED_REWARD": "true"}
    with pytest.raises(UsageError, match="contradict each other"):
        train_config(both, "cpu")
    said = not_understood({"RCE_EPOCH": "3", "GRPO_TEMPERATURE": "1", "HOME": "/", "KL_BETA": "1"})
    assert said == [
        "GRPO_TEMPERATURE is set and not understood: it changes nothing",
        "RCE_EPOCH is set and not understood: it changes nothing; did you mean RCE_EPOCHS?",
    ]


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
    assert paths.find_v2() is None
    paths.v2_folder.mkdir(parents=True)
    (paths.v2_folder / "other_RandSampler_x.ckpt").touch()
    found = paths.find_v2()
    assert found is not None and found.name == "other_RandSampler_x.ckpt"


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
    files: WorldFiles = write_world(
        make_world(WorldSpec(QUERIES, HELD_OUT, 10)), tmp_path / "world"
    )
    paths = LegacyPaths.of(LegacyRun.of(WORDS), tmp_path)
    paths.rl_data.parent.mkdir(parents=True)
    paths.rl_data.write_bytes(files.rl_data.read_bytes())
    vectors = torch.from_numpy(read_vectors(files.embeddings("train"), "npy").copy())
    paths.embeddings("query").parent.mkdir(parents=True)
    for role in ("query", "candidate"):
        torch.save(vectors, paths.embeddings(role))
    paths.v2_folder.mkdir(parents=True)
    selector = make_selector(96, ModelConfig(hidden=32))
    save_v3(tmp_path / "sft.pt", selector, Progress(1, "rce", 0.1, {}))
    convert_checkpoint(tmp_path / "sft.pt", paths.v2_checkpoint)
    monkeypatch.chdir(tmp_path)
    return paths


@pytest.mark.long
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
    assert _use(done.stdout) == QUERIES  # the train split: nothing of another is known
    assert lever(*command).stderr.count("skipped: unchanged") == 5
    older = folder / "grpo_epoch1_v2format.ckpt"
    stale = older.read_bytes()
    monkeypatch.setenv("RCE_LR", "1e-3")
    lever(*command)
    assert older.read_bytes() != stale  # a training writes the file of the one before anew
    trained = load_selector(folder / "grpo_epoch1.pt")[0].state_dict()
    for name, tensor in load_selector(older)[0].state_dict().items():
        assert torch.equal(tensor, trained[name])
    assert json.loads(lever(*command, "--dry-run", "--json", "-").stdout)[0]["verdict"] == "skip"


@pytest.mark.slow
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
        ((*WORDS, "v9"), "unknown version of the selector"),
        ((*WORDS[:4], "a_sampler", WORDS[5]), "unknown sampler"),
    ],
)
def test_bad_legacy_words(words: tuple[str, ...], message: str) -> None:
    done = lever("run", *words, "--dry-run", check=False)
    assert done.returncode == 2 and message in done.stderr


def test_the_legacy_form_without_a_gpu_trains_on_the_cpu_and_says_so(
    legacy: LegacyPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "mine.json"
    legacy.rl_data.rename(elsewhere)
    monkeypatch.setenv("RL_DATA_PATH", "mine.json")
    monkeypatch.setenv("HARD_WEIGHT", "2.0")
    plan = lever("run", *WORDS, "--dry-run", "--json", "-")
    assert "GPU 0 is not there: training on the CPU" in plan.stderr
    assert json.loads(plan.stdout)[0]["verdict"] == "run"


def test_a_device_that_is_not_there_is_refused_in_the_plan(legacy: LegacyPaths) -> None:
    for words in (("--dry-run",), ()):
        done = lever("run", *WORDS, "--device", "cuda:7", *words, check=False)
        assert done.returncode == 2 and "CUDA device" in done.stderr
    assert not (legacy.results / "lever-store").exists()


def test_the_plan_names_everything_that_cannot_be_made(legacy: LegacyPaths) -> None:
    for path in (legacy.v2_checkpoint, legacy.rl_data, legacy.embeddings("candidate")):
        path.unlink()
    done = lever("run", *WORDS, "--device", "cpu", "--dry-run", check=False)
    assert done.returncode == 1
    for name in (
        "questions and annotations of the split train in ",
        "/data/okvqa_local",
        "the model Qwen2_5-VL-3B-Instruct, which makes ",
        "candidate_embeddings.pt",
        "--answerer says who answers",
    ):
        assert name in done.stderr
    assert "rand_sampler → RandSampler" in done.stdout
    legacy.embeddings("query").unlink()
    done = lever("run", *WORDS, "--encoder", "no-such-folder", "--dry-run", check=False)
    assert done.returncode == 1 and "the encoder no-such-folder, which makes " in done.stderr


def test_the_call_says_which_way_it_went(legacy: LegacyPaths, tmp_path: Path) -> None:
    """Images where there are some, else the text; files, else the store; given data, else made."""
    encoder = str(tiny_clip(tmp_path / "encoder"))

    def config() -> PipelineConfig:
        call = LegacyCall(LegacyRun.of(WORDS), tmp_path, {}, answerer="nearest", encoder=encoder)
        return call.config(TrainConfig())

    given = config()
    assert f"embeddings: {legacy.embeddings('query')}" in sources(given)
    assert f"RL starts from: {legacy.v2_checkpoint}" in sources(given)
    assert f"RL data: {legacy.rl_data}" in sources(given)
    for path in (legacy.v2_checkpoint, legacy.rl_data, *map(legacy.embeddings, ROLES)):
        path.unlink()
    with pytest.raises(LeverError, match="questions and annotations of the split train in"):
        config()
    store = Store.create(legacy.results / "lever-store")
    with store.begin(RunSpec("examples", "okvqa", "train")) as writer:
        place = {"dataset": "okvqa", "split": "train"}
        item = {"example_id": 0, "question_id": 5, "question": "?", "answers": ["tea"]}
        writer.write("examples", table(EXAMPLES, [place | item | {"answer": "tea"}]))
        writer.commit()
    stored = config()
    assert stored.data.questions is None and stored.embed.features == "text"
    assert "questions of train: those of the store, if it has any" in sources(stored)
    assert f"embeddings: made by {encoder} from the text alone" in sources(stored)
    assert "RL starts from: SFT on beams that are searched" in sources(stored)
    written = f"RL data: made by nearest, and written to {legacy.rl_data} (notes)"
    assert written in sources(stored)
    (tmp_path / "data" / "mscoco" / "train2014").mkdir(parents=True)
    seeing = config()
    assert seeing.embed.features == "both"
    assert seeing.data.image_root == tmp_path / "data" / "mscoco"
    assert f"embeddings: made by {encoder} from images and text" in sources(seeing)


def test_rl_data_of_another_is_not_written_over(tmp_path: Path) -> None:
    theirs = tmp_path / "rl_data.json"
    theirs.write_text("{}")
    data = DataTable(dataset="d", store=tmp_path / "store", out=tmp_path, rl_out=theirs)
    steps = build_steps(PipelineConfig(data=data), print, lambda done, total, note="": None)
    (generate,) = [step for step in steps if step.name == "generate"]
    with pytest.raises(LeverError, match="a file is in the way that this pipeline did not make"):
        generate.guard()
    theirs.unlink()
    generate.guard()


@pytest.mark.long
def test_the_legacy_form_makes_what_is_missing(
    legacy: LegacyPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Questions and a text encoder: vectors, beams, SFT and RL data are made, the legacy files
    where the legacy code looks for them; the next call leaves them, and a changed one is given."""
    monkeypatch.setenv("RCE_EPOCHS", "1")
    monkeypatch.setenv("BATCH_SIZE", "32")
    for path in (legacy.v2_checkpoint, legacy.rl_data):
        path.unlink()
    for role in ("query", "candidate"):
        legacy.embeddings(role).unlink()
    data = tmp_path / "data" / "okvqa_local"
    data.mkdir(parents=True)
    world = WorldFiles(tmp_path / "world")
    names = {"train": "OpenEnded_mscoco_train2014_questions.json", "val": "val_questions.json"}
    for split, name in names.items():
        (data / name).write_bytes(world.questions(split).read_bytes())
    (data / "mscoco_train2014_annotations.json").write_bytes(
        world.annotations("train").read_bytes()
    )
    encoder = tiny_clip(tmp_path / "encoder")
    command = ["run", *WORDS, "--device", "cpu", "--answerer", "nearest", "--encoder", encoder]
    assert not (legacy.results / "lever-store").exists()
    outputs = json.loads(lever(*command, "--json", "-").stdout)
    assert _use(lever(*command).stdout) == QUERIES
    assert outputs["embed"]["query"] == str(legacy.embeddings("query"))
    assert outputs["beam"]["run"] and outputs["sft"]["checkpoint"]
    rl_data = json.loads(legacy.rl_data.read_text())
    assert len(rl_data) == QUERIES  # no _meta: these are words of the notes, whose code has none
    assert rl_data["0"]["pointer_candidates"][0]["scorer"].startswith("nearest")
    assert len(torch.load(legacy.embeddings("candidate"), weights_only=True)) == QUERIES
    (run,) = outputs["ingest"]["examples"]
    manifest = legacy.results / "lever-store" / "runs" / f"run={run}" / "manifest.json"
    assert json.loads(manifest.read_text())["details"]["order"] == "question_id"
    plan = json.loads(lever(*command, "--dry-run", "--json", "-").stdout)
    assert {item["verdict"] for item in plan} == {"skip", "idle"}
    _infer(legacy, data, world, encoder)
    del rl_data["0"]
    legacy.rl_data.write_text(json.dumps(rl_data))
    plan = json.loads(lever(*command, "--dry-run", "--json", "-").stdout)
    assert {item["step"]: item["why"] for item in plan}["generate"] == "RL data is given"


def _infer(legacy: LegacyPaths, data: Path, world: WorldFiles, encoder: Path) -> None:
    """The words with a version evaluate what they trained, and answer in official files."""
    words = [*WORDS, "v3", "--answerer", "nearest", "--encoder", encoder]
    done = lever("run", *words, "--dry-run", check=False)
    assert done.returncode == 1 and "annotations of the split val in " in done.stderr
    (data / "val_annotations.json").write_bytes(world.annotations("val").read_bytes())
    done = lever("run", *words, "--device", "cpu")
    folder = legacy.results / "predictions" / legacy.v3_folder("").name
    assert f"inference with {legacy.v3_folder('') / 'rce_epoch1.pt'}" in done.stdout
    found = json.loads((folder / "rce_epoch1_shot2.json").read_text())
    assert len(found) == HELD_OUT and found[0].keys() == {"question_id", "answer"}
    place = ("--store", legacy.results / "lever-store", "--dataset", "okvqa", "--split", "val")
    said = lever("ingest", folder / "rce_epoch1_shot2.json", *place).stderr
    rows = json.loads((folder / "eval.json").read_text())["rows"]
    (own,) = [r for r in rows if r["selector"] == "rce_epoch1" and r["shots"] == 2]
    assert f"accuracy {own['accuracy']:.2%} of {HELD_OUT} questions" in said
    done = lever("eval", *words, "--device", "cpu", "--shots", "1")
    assert "[embed] skipped" in done.stderr and "shots: [1, 2, 3, 4] → [1]" in done.stderr
    done = lever("eval", *WORDS, "--checkpoint", "x.pt", check=False)
    assert done.returncode == 2 and "the legacy words say that themselves" in done.stderr
    v2 = lever("run", *WORDS, "v2", "--answerer", "nearest", "--encoder", encoder, "--dry-run")
    assert "/sft/sft_epoch" in v2.stdout


def test_without_a_config_it_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lever("run", check=False)
    assert done.returncode == 2 and "there is no lever.toml here" in done.stderr


@pytest.mark.long
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
        "[pool]\nsize = 8\n[beam]\nlimit = 20\n[train.sft]\nepochs = 1\n"
        "[train.rce]\nepochs = 1\n[train.run]\nbatch_size = 16\n[eval]\nshots = [1, 2]\n"
    )
    outputs = json.loads(lever("run", "--config", config, "--json", "-").stdout)
    assert outputs["beam"]["run"].startswith("beam-demo-train-")
    assert outputs["generate"]["run"].startswith("rollout-demo-train-")
    assert outputs["sft"]["checkpoint"].endswith("sft/sft_epoch1.pt")
    found = json.loads(Path(outputs["evaluate"]["json"]).read_text())
    assert {row["selector"] for row in found["rows"]} == {
        "zero_shot", "random", "nearest", "vote", "oracle", "sft", "rce",
    }  # fmt: skip
    plan = json.loads(lever("run", "--config", config, "--dry-run", "--json", "-").stdout)
    verdicts = {item["step"]: item["verdict"] for item in plan}
    assert verdicts.pop("embed") == "idle" and set(verdicts.values()) == {"skip"}
    assert _use(lever("run", "--config", config).stdout) == 40
    gated = config.read_text() + '[audit]\nfail_on = ["queries > 1"]\n'
    config.write_text(gated)
    stopped = lever("run", "--config", config, check=False)
    assert stopped.returncode == 1 and "queries" in stopped.stderr
    assert "[train]" not in stopped.stderr


def test_the_yaml_config_of_the_notes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train_v3_rl.yaml"
    path.write_text(
        "# configs/train_v3_rl.yaml\nrce:\n  epochs: 5\n  lr: 1e-4\n\n"
        "grpo:\n  epochs: 0\n  lr: 5e-5\n  kl_beta_init: 0.1\n"
        "  kl_target_min: 0.01\n  kl_target_max: 0.05\n"
    )
    toml = Path(__file__).resolve().parents[1] / "examples" / "train_v3_rl.toml"
    assert resolve(path, {}) == resolve(toml, {})
    for text, message in (
        ("rce:\n  epoch: 5", "did you mean epochs"),
        ("rce: [", "is not YAML"),
        ("- 1", "is not a mapping"),
        ("1: 2", "is not a mapping"),
        ("rce: 5", "rce"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError) as error:
            resolve(path, {})
        assert message in error.value.message() + str(error.value.hint)


def test_numbers_after_one_flag_are_read_as_the_notes_write_them(tmp_path: Path) -> None:
    for numbers in (("1.0", "1.3"), ("1.0,1.3",), ("1.0,", "1.3")):
        done = lever(
            "generate", "--store", tmp_path, "--temps", *numbers, "--seed", "3", check=False
        )
        assert ("unexpected extra" in done.stderr) == (numbers[0] == "1.0,")
    done = lever("generate", "--store", tmp_path, "--temps", "1.0", "-1", check=False)
    assert done.returncode == 2
    done = lever("generate", "--store", tmp_path, "--temps", "1.0", "1.0", check=False)
    assert "--temps are distinct temperatures" in done.stderr
    done = lever("generate", "--store", tmp_path, "--limit", "5", "6", check=False)
    assert "5,6" in done.stderr
