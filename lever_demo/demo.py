"""The demo: the whole pipeline on the embedded world, from legacy JSON to a table of accuracies.

In goes a folder to fill; out comes a :class:`DemoResult`. The held-out questions are never
trained on, and no demonstration is one of them. The selector has to learn which directions of an
embedding matter (the kind of thing on the picture) from rewards alone; nearest-neighbour compares
all of them and is misled by places and cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lever_data.errors import UsageError
from lever_data.report.views import ViewInfo, list_views
from lever_data.store.files import write_atomic
from lever_data.store.store import Run, Store
from lever_demo.files import DATASET, WorldFiles, write_world
from lever_demo.world import WorldSpec, make_world
from lever_train.evaluate.scores import Scoreboard, read_json
from lever_train.flow.pipeline import Outputs
from lever_train.flow.run import run, use_it
from lever_train.learn.train import Advance
from lever_train.options.pipeline import PipelineConfig, load_pipeline

VIEW = "beam_sample_file_only"
VIEWS_SHOWN = ("all_candidates", "beam", "beam_sample", VIEW, "balanced", "learnable")
CONFIG = "lever.toml"
# The legacy defaults (5 epochs at 1e-4) are meant for a hundred times the data. One thread: steps
# this small gain nothing from a second, and wait for it on a busy machine.
_TOML = """\
# The pipeline of `lever demo`: change it, then `lever run --config {config}` does what is needed.
[data]
store = "store"
out = "out"
dataset = "{dataset}"
rl_data = ["{rl_data}"]
beam_data = ["{beam_data}"]
questions = "{train_questions}"
annotations = "{train_annotations}"
eval_questions = "{val_questions}"
eval_annotations = "{val_annotations}"
query_embeddings = "{train_embeddings}"
eval_embeddings = "{val_embeddings}"
pool = "{train_pool}"
eval_pool = "{val_pool}"

[answerer]
spec = "nearest"
query_embeddings = "{val_vision}"
candidate_embeddings = "{train_vision}"

[audit]
fail_on = ["fallback_share > 0.1", "teachable_share < 0.2"]

[train.data]
view = ["{view}"]

[train.sft]
epochs = 10
lr = 1e-3

[train.rce]
epochs = {epochs}
lr = 1e-3

[train.grpo]
epochs = 1
lr = 1e-4
kl_beta_init = 0.15
reference = "rce"

[train.run]
batch_size = 32
seed = {seed}
threads = 1
"""


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo goes and how large its world is; ``say`` gets one line a step."""

    out: Path
    world: WorldSpec = field(default_factory=WorldSpec)
    epochs: int = 12
    say: Callable[[str], None] = lambda line: None
    advance: Advance = lambda done, total, note="": None


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: the world's files, the config, the runs and views of the store, the
    outputs of the pipeline's steps, and the last table."""

    files: WorldFiles
    config: PipelineConfig
    runs: tuple[Run, ...]
    views: tuple[ViewInfo, ...]
    outputs: Mapping[str, Outputs]
    scoreboard: Scoreboard


def run_demo(options: DemoOptions) -> DemoResult:
    """Write the world and its ``lever.toml``, and run the pipeline on it.

    Raises:
        UsageError: the folder holds something else.
    """
    files, config = prepare_demo(options)
    outputs = run(config, options.say, options.advance)
    options.say(f"use it: {use_it(config, outputs)}")
    store = Store.open(config.data.store)
    views = list_views(store.path, folders=("views",))
    return DemoResult(
        files,
        config,
        tuple(store.runs()),
        tuple(view for view in views if view.name in VIEWS_SHOWN),
        outputs,
        read_json(Path(outputs["evaluate"]["json"])),
    )


def prepare_demo(options: DemoOptions) -> tuple[WorldFiles, PipelineConfig]:
    """Write the world and its ``lever.toml``, and run nothing.

    Raises:
        UsageError: the folder holds something else.
    """
    folder = options.out
    _require_ours(folder)
    options.say("making a small visual-question world")
    files = write_world(make_world(options.world), folder / "world")
    write_atomic(folder / CONFIG, _toml(files, options).encode())
    return files, load_pipeline(folder / CONFIG)


def _require_ours(folder: Path) -> None:
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / "world").is_dir())
    ):
        raise UsageError(
            "the folder of the demo holds something else",
            value=str(folder),
            hint="name another with --out",
        )


def _toml(files: WorldFiles, options: DemoOptions) -> str:
    def name(path: Path) -> str:
        return path.relative_to(options.out).as_posix()

    by_split = {
        f"{split}_{what}": name(getattr(files, what)(split))
        for split in ("train", "val")
        for what in ("questions", "annotations", "embeddings", "vision", "pool")
    }
    return _TOML.format(
        config=CONFIG,
        dataset=DATASET,
        rl_data=name(files.rl_data),
        beam_data=name(files.beam_data),
        view=VIEW,
        epochs=options.epochs,
        seed=options.world.seed,
        **by_split,
    )
