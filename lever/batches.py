"""Batches of a view for a training loop of one's own.

In go a view and the options of a training; out come the padded tensors that ``lever train`` would
see, in the order in which it would see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from lever_data.errors import UsageError
from lever_train.inputs.devices import open_device
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.data import open_data
from lever_train.options.train import Source, TrainConfig
from lever_train.selector.model import Pool

if TYPE_CHECKING:
    from lever.views import View


@dataclass(frozen=True)
class Batches:
    """An iterable of :class:`~lever_train.learn.batch.Batch`, on the CPU; each pass begins anew.

    It may be given to ``torch.utils.data.DataLoader`` through an ``IterableDataset``, but needs
    none: it collates ahead in a thread.
    """

    loader: Loader
    config: TrainConfig

    def __iter__(self) -> Iterator[Batch]:
        """The training queries in the order of epoch 0."""
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The training queries in an order that is a function of the seed and ``number`` alone."""
        data, run = self.config.data, self.config.run
        yield from self.loader.batches(
            self.loader.data.train, order=data.order, seed=run.seed, epoch=number
        )

    def vectors(self, batch: Batch) -> tuple[Float[Tensor, "B d"], Pool]:
        """What a selector reads for a batch, on the config's device: queries and their pools."""
        return self.loader.vectors(batch)


def open_batches(view: View, config: TrainConfig) -> Batches:
    """Open what :meth:`lever.View.batches` gives."""
    data = config.data
    if "view" in data.model_fields_set and data.view != (view.name,):
        raise UsageError("the config names another view", where=view.name, value=data.view)
    if data.scorer not in (None, view.scorer):
        raise UsageError("the config names another scorer", where=view.name, value=data.scorer)
    config = config.but(data=data.but(view=(view.name,), scorer=view.scorer))
    opened = open_data(Source(store=view.store, runs=view.runs, sql_dir=view.sql_dir), config)
    loader = Loader(
        opened,
        open_device(config.run.device),
        batch_size=config.run.batch_size,
        shot_num=data.shot_num,
        can_stop=config.model.ends_pointers,
    )
    return Batches(loader, config)
