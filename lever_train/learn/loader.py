"""Batches with their vectors: the stream, collated ahead of time, and the embeddings it names.

In go :class:`TrainingData` and a position; out come :class:`Feed` objects on the device. The next
batches are read and collated by a thread while the current one trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.relations.selection import Selection
from lever_data.relations.stream import scan
from lever_train.inputs.pools import SharedPool
from lever_train.learn.batch import Batch, CollateOptions, Share, collate
from lever_train.learn.data import TrainingData
from lever_train.selector.model import Pool

AHEAD = 3  # batches collated before they are needed


@dataclass(frozen=True)
class Feed:
    """A batch and what the selector reads for it: ``query`` [B, d] and the pool's vectors."""

    batch: Batch
    query: Tensor
    pool: Pool


@dataclass(frozen=True)
class Position:
    """Where a pass over the data stands: its order, and the groups already seen."""

    order: Literal["random", "file"]
    seed: int = 0
    epoch: int = 0
    skip_groups: int = 0


class Loader:
    """Reads selections of one :class:`TrainingData` with its vectors on one device."""

    def __init__(
        self,
        data: TrainingData,
        device: torch.device,
        *,
        batch_size: int,
        shot_num: int | None = None,
        share: Share = Share(),
    ) -> None:
        self.data = data
        self.device = device
        self.options = CollateOptions(data.pools, batch_size, shot_num, share)
        self.queries = data.queries.to(device)
        self.candidates = (
            self.queries if data.candidates is data.queries else data.candidates.to(device)
        )
        self.shared: Pool | None = None
        if isinstance(data.pools, SharedPool):
            ids = torch.from_numpy(data.pools.ids)
            self.shared = Pool(self.candidates[ids.to(device)])

    def batches(self, selection: Selection, position: Position) -> Iterator[Batch]:
        """This process's share of every batch of one pass, on the CPU."""
        stream = scan(
            self.data.con,
            selection,
            order=position.order,
            seed=position.seed,
            epoch=position.epoch,
            skip_groups=position.skip_groups,
        )
        yield from _ahead(collate(stream, self.options))

    def require_vectors(self, batch: Batch) -> None:
        """Refuse a batch whose vectors are not all there.

        Raises:
            LeverError: a query or a candidate has no row in its embeddings; it names the query.
        """
        outside = batch.query >= len(self.queries)
        if outside.any():
            raise LeverError(
                f"the query embeddings have {len(self.queries):,} rows, none for a query",
                where=f"query {int(batch.query[outside][0])}",
            )
        if batch.pool is not None:
            _require_rows(batch.pool, len(self.candidates), batch.query)

    def feed(self, batch: Batch) -> Feed:
        """The vectors of a batch.

        Raises:
            LeverError: see :meth:`require_vectors`.
        """
        self.require_vectors(batch)
        moved = batch.to(self.device)
        query = self.queries[moved.query]
        if self.shared is not None:
            return Feed(moved, query, self.shared)
        assert moved.pool is not None
        return Feed(moved, query, Pool.distinct(self.candidates, moved.pool))


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as worker:
        waiting = deque(worker.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(worker.submit(next, batches, None))
            yield batch


def _require_rows(ids: Tensor, rows: int, queries: Tensor | None) -> None:
    outside = (ids >= rows) | (ids < -1)
    if outside.any():
        at = outside.nonzero()[0]
        raise LeverError(
            f"the candidate embeddings have {rows:,} rows, none for example {int(ids[tuple(at)])}",
            where=f"query {int(queries[at[0]])}" if queries is not None else "the shared pool",
        )
