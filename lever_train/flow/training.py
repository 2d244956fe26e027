"""A training as a step of the pipeline runs it: its config, what its key is made of, and the call.

In go the pipeline's config and what earlier steps made; out come checkpoints in the step's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lever_train.flow.work import StepOutputs, Work
from lever_train.learn.folder import TrainingFolder
from lever_train.learn.state import STATE, StateError
from lever_train.learn.train import TrainResult, train
from lever_train.options.pipeline import PipelineConfig
from lever_train.options.train import RunConfig, Source, TrainConfig

# Of [run]: another value leaves a finished training as good as it was. Other threads would round
# differently and end close to it, not with the same bits: a pipeline that moves to a machine with
# more cores keeps its result. A killed training starts anew there: its state compares the threads.
_FREE = {"threads", "save_every", "memory_limit"}
_RUN_OF_SFT = {"seed", "device", "precision", "gradient_clip", "tensorboard", "trackio", *_FREE}


def sft_config(config: PipelineConfig) -> TrainConfig:
    """What SFT trains with. What matters to RL alone keeps its default, so that changing it
    neither redoes SFT nor bars the state of one that was killed."""
    train = config.train
    best_beams = {"view": ("beam_infoscore",), "gen_method": (), "skip_fallback": False}
    best_beams |= {"require_positive_query": False}
    run = train.run.model_dump(include=_RUN_OF_SFT)
    return TrainConfig(
        data=train.data.model_copy(update=best_beams),
        model=train.model,
        sft=train.sft,
        run=RunConfig(stage="sft", batch_size=config.sft.batch_size, **run),
    )


def keyed(config: TrainConfig) -> dict[str, Any]:
    """The options a training's result depends on, as JSON values."""
    return config.model_dump(mode="json", exclude={"run": _FREE})


def with_data(
    work: Work, known: StepOutputs, config: TrainConfig, checkpoint: str | None
) -> TrainConfig:
    """A training config with the pipeline's files in it."""
    query, candidate, _ = work.embeddings(known)
    changes: dict[str, Any] = {
        "query_embeddings": query,
        "candidate_embeddings": None if candidate == query else candidate,
        "pool": work.pools(known)[0],
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=changes),
            "model": config.model.model_copy(update={"sft_checkpoint": checkpoint}),
        }
    )


def run_training(
    work: Work, out: Path, config: TrainConfig, runs: tuple[str, ...], begun: bool
) -> TrainResult:
    """Train into ``out``.

    One that was ``begun`` goes on from its state. Where that no longer fits, because what it was
    begun with changed, it starts anew and says so.
    """
    source = Source(store=work.config.data.store, runs=runs, sql_dir=work.config.data.sql_dir)

    def start(resume: bool) -> TrainResult:
        return train(
            source,
            out,
            config,
            resume=resume,
            overwrite=not resume,
            notify=lambda line: None if "\n" in line else work.say(line),  # the config is saved
            advance=work.advance,
        )

    try:
        return start(resume=begun and (out / STATE).exists())
    except StateError as error:
        work.say(f"{error.message()}: the training starts anew")
        return start(resume=False)


def last_checkpoints(result: TrainResult) -> dict[str, Path]:
    """The last checkpoint of every phase, in order."""
    last = {row["phase"]: row["epoch"] for row in result.epochs}
    return {name: result.out / f"{name}_epoch{epoch}.pt" for name, epoch in last.items()}


def require_own(folder: Path) -> None:
    """Refuse to train where checkpoints lie that no training of ours made.

    Raises:
        LeverError: it names them.
    """
    TrainingFolder(folder).require_own()
