"""What the plan of `lever run` refuses: everything it can know, before any step has run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lever_demo.files import WorldFiles, write_world
from lever_demo.world import WorldSpec, make_world
from lever_train.options.train import ModelConfig
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.kinds import make_selector
from tests.cases import long_except
from tests.commands import lever

CASES = {
    "view": ('[train.data]\nview = ["nope"]', "there is no such view"),
    "mode": ('[train.reward]\nmode = "nope"', "unknown reward mode"),
    "expression": ('[train.reward]\nexpression = "correct + "', "not one SQL expression"),
    "column": ('[train.reward]\nexpression = "no_such"', "no_such"),
    "gate": ('[audit]\nfail_on = ["foo > 1"]', "the audit has no such figure"),
    "answerer": ('[answerer]\nspec = "nonsense"', "unknown answerer"),
    "images": ('[answerer]\nspec = "transformers:a/b"', "this answerer looks at images"),
    "model": (
        '[answerer]\nspec = "transformers:./no/such/folder"\nimages = false',
        "there is no model for the answerer here",
    ),
    "words": ('[answerer]\nsystem_prompt = "no.txt"', "the system prompt"),
    "start": ('[sft]\ncheckpoint = "bad.pt"', "not a torch file"),
    "checkpoint": ('[eval]\ncheckpoint = "bad.pt"', "not a torch file"),
    "pool": ("[pool]\nsize = 60", "a pool cannot be larger"),
    "device": ('[train.run]\ndevice = "cuda:7"', "CUDA device"),
}
FILES = {
    "RL data": ('rl_data = ["none.json"]', "the RL data 1 are not there"),
    "store": ('store = "bad.pt"', "lever.json"),
    "vectors": ('candidate_embeddings = "bad.pt"', "bad.pt"),
}


OF_ANOTHER_SPLIT = {  # what the plan is given, a file of which split, and what it says
    "pool": ("pool", "pool", "val", "20 rows, the split train has 60 questions"),
    "eval_pool": ("eval_pool", "pool", "train", "60 rows, the split val has 20 questions"),
    "vectors": ("candidate_embeddings", "embeddings", "val", "the split of the demonstrations has"),
    "answerer": (
        "query_embeddings",
        "embeddings",
        "train",
        "60 rows, the split val has 20 questions",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_world(make_world(WorldSpec(60, 20, 8)), tmp_path_factory.mktemp("world"))


def _config(world: WorldFiles, folder: Path, more: str, vectors: bool = True) -> Path:
    lines = ["[data]", 'dataset = "demo"']
    for name, split in (("", "train"), ("eval_", "val")):
        lines += [f'{name}questions = "{world.questions(split)}"']
        lines += [f'{name}annotations = "{world.annotations(split)}"']
        if vectors:
            name = name or "query_"
            lines += [f'{name}embeddings = "{world.embeddings(split)}"']
    path = folder / "lever.toml"
    path.write_text("\n".join([*lines, more]))
    (folder / "bad.pt").write_text("no checkpoint")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    long_except([*CASES, *FILES], "view", "column", "model", "checkpoint", "store", "vectors"),
)
def test_the_plan_refuses_what_it_can_know(case: str, world: WorldFiles, tmp_path: Path) -> None:
    more, message = (CASES | FILES)[case]
    path = _config(world, tmp_path, more)
    before = sorted(tmp_path.rglob("*"))
    for words in (("--dry-run",), ()):
        done = lever("run", "--config", path, *words, check=False)
        assert done.returncode != 0 and message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_ANOTHER_SPLIT)
def test_the_plan_refuses_files_of_another_split(
    case: str, world: WorldFiles, tmp_path: Path
) -> None:
    key, kind, split, message = OF_ANOTHER_SPLIT[case]
    table = "[answerer]\n" if case == "answerer" else ""
    path = _config(world, tmp_path, f'{table}{key} = "{getattr(world, kind)(split)}"')
    done = lever("run", "--config", path, "--dry-run", check=False)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_the_plan_refuses_a_checkpoint_of_another_width(world: WorldFiles, tmp_path: Path) -> None:
    selector = make_selector(12, ModelConfig(), 0)
    save_v3(tmp_path / "wide.pt", selector, Progress(1, "rce", 0.1, {}))
    for table in ("sft", "eval"):
        path = _config(world, tmp_path, f'[{table}]\ncheckpoint = "wide.pt"')
        done = lever("run", "--config", path, "--dry-run", check=False)
        assert done.returncode == 1 and "takes embeddings of width 12" in done.stderr


def test_the_plan_refuses_an_encoder_or_images_that_are_not_there(
    world: WorldFiles, tmp_path: Path
) -> None:
    for more, message in (
        ("", "images are needed"),
        ('[embed]\nfeatures = "text"\nencoder = "./no/such"', "no model for the encoder here"),
    ):
        path = _config(world, tmp_path, more, vectors=False)
        done = lever("run", "--config", path, "--dry-run", check=False)
        assert done.returncode == 2 and message in done.stderr


def test_the_users_own_view_is_known_to_the_plan(world: WorldFiles, tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "mine.sql").write_text("select * from all_candidates")
    path = _config(world, tmp_path, 'sql_dir = "sql"\n[train.data]\nview = ["mine"]')
    assert lever("run", "--config", path, "--dry-run").returncode == 0
