"""All data read once without training, so that what would stop a training stops it beforehand.

In go a loader and the data; out comes nothing, or the error that training would have ended with.
"""

from __future__ import annotations

import torch

from lever_data.errors import LeverError
from lever_train.learn.data import TrainingData
from lever_train.learn.distributed import World
from lever_train.learn.loader import Loader, Position
from lever_train.learn.losses import tied_groups
from lever_train.learn.objectives import group_weights
from lever_train.options.train import TrainConfig


def rehearse(
    loader: Loader, data: TrainingData, stage: str, config: TrainConfig, world: World
) -> None:
    """Read every batch of the first epoch and of validation, in their order; of several processes
    each reads its share.

    Args:
        stage: the first one, ``sft``, ``rce`` or ``grpo``: what it does with ties counts.

    Raises:
        LeverError: a reward that is not finite, a pointer outside its pool, a query or a candidate
            without a vector, or nothing but ties.
    """
    counts = torch.zeros(3, dtype=torch.float64)  # weight, tied groups, groups
    first = Position(config.data.order, config.run.seed)
    for batch in loader.batches(data.train, first):
        loader.require_vectors(batch)
        weight = group_weights(batch, stage, config).sum()
        tied = tied_groups(batch.reward, batch.mask).sum()
        counts += torch.stack([weight, tied, torch.tensor(len(batch))])
    total, tied_sum, groups = world.sum(counts).tolist()
    if not total:
        raise nothing_to_learn(config, tied_sum, groups)
    if data.validation is not None:
        for batch in loader.batches(data.validation, Position("file")):
            loader.require_vectors(batch)


def nothing_to_learn(config: TrainConfig, tied: float, groups: float) -> LeverError:
    """The error of a training whose groups are all tied."""
    return LeverError(
        "every group is tied: there is nothing to learn from",
        where=", ".join(config.data.view),
        value=f"{tied:,.0f} of {groups:,.0f} groups",
        hint="--tied-groups keep trains on them all the same; another reward may tell "
        "the candidates apart",
    )
