"""A rollout ready to be worked on: what its shards are made from, and where they lie.

``resolve.py`` makes a :class:`Job` from a request; ``work.py`` makes the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lever_data.items.items import Truth
from lever_data.items.prompts import Item
from lever_data.store.store import RunSpec, Store
from lever_train.inputs.pools import PoolSource
from lever_train.options.rollout import Recipe, Request
from lever_train.rollout import views
from lever_train.rollout.answerers.base import Answerer
from lever_train.rollout.asking import Asker, Tally, scope
from lever_train.rollout.cache import open_cache
from lever_train.rollout.policy import Policy
from lever_train.rollout.proposals import Proposals
from lever_train.rollout.shards import ShardFolder
from lever_train.rollout.table import Label

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """What shards are made from.

    ``query_ids`` [n] int64 ascending; ``items`` and ``truths`` by query id; ``examples`` by
    example id; ``pool`` ``None`` where pointers come from a view; ``given`` those pointers, their
    ``row`` indexing ``query_ids``; ``known`` what is stored of targeted queries.
    """

    request: Request
    store: Store
    spec: RunSpec
    label: Label
    recipe: Recipe
    query_ids: Ids
    items: Mapping[int, Item]
    truths: Mapping[int, Truth]
    examples: Mapping[int, Item]
    own: bool
    answerer: Answerer
    policy: Policy | None
    query_vectors: Tensor | None
    example_vectors: Tensor | None
    pool: PoolSource | None
    given: Proposals | None
    known: views.Known | None

    @property
    def shards(self) -> list[slice]:
        """Consecutive ranges of ``query_ids``."""
        size = self.request.shard_size
        return [
            slice(s, min(s + size, len(self.query_ids)))
            for s in range(0, len(self.query_ids), size)
        ]

    def prefixes(self, length: int) -> list[int]:
        """The lengths at which a pointer of ``length`` is scored, the whole last."""
        return sorted({k for k in self.request.shots if k < length} | {length})


def shard_folder(job: Job) -> ShardFolder:
    """Where the job's shards lie: named after the run and the size of a shard."""
    key = f"{job.spec.run_id()}-s{job.request.shard_size}"
    return ShardFolder(
        job.store.path / "jobs" / key,
        len(job.shards),
        lambda: job.store.find(job.spec) is not None,
    )


def new_asker(job: Job, on_progress: Callable[[Tally], None] = lambda tally: None) -> Asker:
    """The job's answerer behind the store's cache."""
    return Asker(job.answerer, open_cache(job.store.path, scope(job.answerer)), on_progress)
