"""The demo: the whole line on the embedded world, from legacy JSON to a table of accuracies.

In goes a folder to fill; out comes a :class:`DemoResult`. The held-out questions are never
trained on, and no demonstration is one of them. The selector has to learn which directions of an
embedding matter (the kind of thing on the picture) from rewards alone; nearest-neighbour compares
all of them and is misled by places and cameras.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lever_data import connect
from lever_data.demo_files import DATASET, WorldFiles, write_world
from lever_data.demo_world import WorldSpec, make_world
from lever_data.errors import UsageError
from lever_data.ingest import Ingested, IngestOptions, ingest
from lever_data.store import Store
from lever_data.views import ViewInfo, list_views
from lever_train.config import DataConfig, RceConfig, RunConfig, TrainConfig
from lever_train.data import Source
from lever_train.eval_request import Questions
from lever_train.evaluate import EvalOptions, Outcome, evaluate
from lever_train.heldout import HeldOut, open_held_out
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.policy import load_policy
from lever_train.scoreboard import Scoreboard, scoreboard
from lever_train.train import Advance, TrainRequest, TrainResult, train

VIEW = "beam_sample_file_only"
VIEWS_SHOWN = ("all_candidates", "beam", "beam_sample", VIEW, "balanced", "learnable")
SHOTS = (1, 2)
# the legacy defaults (5 epochs at 1e-4) are meant for a hundred times the data
EPOCHS, LEARNING_RATE, BATCH_SIZE = 12, 1e-3, 32


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo goes and how large its world is; ``say`` gets one line a step."""

    out: Path
    world: WorldSpec = field(default_factory=WorldSpec)
    epochs: int = EPOCHS
    say: Callable[[str], None] = lambda line: None
    advance: Advance = lambda done, total, note="": None


@dataclass(frozen=True)
class DemoResult:
    """What the demo made, step by step."""

    files: WorldFiles
    store: Path
    ingested: tuple[Ingested, ...]
    views: tuple[ViewInfo, ...]
    training: TrainResult
    scoreboard: Scoreboard


def run_demo(options: DemoOptions) -> DemoResult:
    """Write the world, ingest it, train on a view of it and compare on held-out questions.

    Raises:
        UsageError: the folder holds something else.
    """
    folder = options.out
    _require_ours(folder)
    options.say("making a small visual-question world")
    files = write_world(make_world(options.world), folder / "world")
    store = Store.create(folder / "store")
    options.say("ingesting it from legacy JSON")
    ingested = tuple(_ingest(files, store))
    views = list_views(store.path, folders=("views",))
    options.say(f"training on the view {VIEW}")
    training = _train(files, store, options)
    options.say("comparing on held-out questions")
    return DemoResult(
        files,
        store.path,
        ingested,
        tuple(view for view in views if view.name in VIEWS_SHOWN),
        training,
        scoreboard(_compare(files, store, training)),
    )


def _require_ours(folder: Path) -> None:
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / "world").is_dir())
    ):
        raise UsageError(
            "the folder of the demo holds something else",
            value=str(folder),
            hint="name another with --out",
        )


def _ingest(files: WorldFiles, store: Store) -> list[Ingested]:
    options = IngestOptions(dataset=DATASET, split="train")
    paths = [files.rl_data, files.beam_data, files.questions("train"), files.annotations("train")]
    return list(ingest(paths, store, options))


def _train(files: WorldFiles, store: Store, options: DemoOptions) -> TrainResult:
    config = TrainConfig(
        data=DataConfig(view=(VIEW,), query_embeddings=str(files.embeddings("train"))),
        rce=RceConfig(epochs=options.epochs, lr=LEARNING_RATE),
        # one thread: steps this small gain nothing from a second, and wait for it on a busy machine
        run=RunConfig(batch_size=BATCH_SIZE, seed=options.world.seed, threads=1),
    )
    return train(
        TrainRequest(
            source=Source(store.path),
            out=options.out / "checkpoints",
            config=config,
            overwrite=True,
            advance=options.advance,
        )
    )


def _compare(files: WorldFiles, store: Store, training: TrainResult) -> list[Outcome]:
    held = held_out(files, store)
    answerer = world_answerer(files, held)
    policies = {"trained": load_policy(training.last, "cpu")}
    return evaluate(held, answerer.answer, policies, EvalOptions(shots=SHOTS))


def held_out(files: WorldFiles, store: Store) -> HeldOut:
    """The held-out questions of the world with their pools of train items."""
    questions = Questions(
        dataset=DATASET,
        split="val",
        query_embeddings=str(files.embeddings("val")),
        candidate_embeddings=str(files.embeddings("train")),
        pool=str(files.pool("val")),
        questions=files.questions("val"),
        annotations=files.annotations("val"),
    )
    return open_held_out(connect(store), questions)


def world_answerer(files: WorldFiles, held: HeldOut) -> NearestAnswerer:
    """The world's answerer: it compares what it sees itself, not the selector's embeddings."""
    return NearestAnswerer(
        np.load(files.vision("val")),
        np.load(files.vision("train")),
        [item.answers for item in held.examples.values()],
    )
