"""What the user asks of ``lever value``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lever_data.options import Section, Without, option
from lever_data.relations.reward_spec import RewardSpec
from lever_data.vocabulary import DEFAULT_STORE, Device, RunNames, Seed, SqlDir, StorePath
from lever_train.options.train import DataConfig


class ValueRequest(Section):
    """Which selectors, and the stored candidates that tell their worth."""

    checkpoints: tuple[Path, ...] = option(
        ..., "A selector.", "--checkpoint", metavar="FILE", everyday=True, min_length=1
    )
    store: StorePath = DEFAULT_STORE
    runs: RunNames = ()
    sql_dir: SqlDir = None
    data: Annotated[
        DataConfig, Without("split_ratio", "split_by", "order", "allow_mixed")
    ] = Field(default_factory=DataConfig)  # fmt: skip
    reward: RewardSpec = Field(default_factory=RewardSpec)
    behaviour: Literal["stored", "uniform"] = option(
        "stored",
        "How the candidates were drawn: samples by their stored log-probabilities, or uniformly "
        "from the pool (or all of it).",
        everyday=True,
    )
    least_support: float = option(
        0.1, "Refuse where the mean importance weight is below this; 1: all is there.", ge=0, le=1
    )
    seed: Seed = 0
    batch_size: int = option(64, "Groups per step.", ge=1)
    device: Device = "cpu"
