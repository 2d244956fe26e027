"""Shards on Ray Data: a pool of actors, each with the answerer loaded once.

In go a resolved job and the numbers of its missing shards; the actors resolve the same request
against the same store (a bucket, or a file system all of them see), check that they mean the same
run, and write the same shards a local process would. Only shard numbers and tallies travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lever_data.errors import LeverError
from lever_data.paths import store_name
from lever_train.inputs.actors import spread
from lever_train.options.rollout import Execution, Request
from lever_train.rollout.ask import Talk, Tally
from lever_train.rollout.job import Job, new_asker, shard_folder
from lever_train.rollout.resolve import resolve
from lever_train.rollout.shards import ShardRows

Progress = Callable[[float, float | None, str], None]
Maker = Callable[[Job, slice], Talk[ShardRows]]


class ShardWorker:
    """An actor that makes shards of one request.

    Args:
        store: its address, as a bucket's mirror lies elsewhere on each machine.
        run, kind: what the driver means to make.
        make: a function of a module, which travels by its name.
    """

    def __init__(self, request: Request, store: str, run: str, kind: str, make: Maker) -> None:
        self.job = resolve(request.but(which=request.which.but(store=store)), kind)
        if self.job.spec.run_id() != run:
            raise LeverError(
                "a worker sees other data than the driver; the store must be in a bucket or on a "
                "shared file system, and must not change under a job",
                value=f"{self.job.spec.run_id()} instead of {run}",
            )
        self.folder, self.make = shard_folder(self.job), make
        self.asker = new_asker(self.job)

    def _counts(self) -> dict[str, int]:
        tally = self.asker.tally
        return {"wanted": tally.wanted, "asked": tally.asked, "hits": tally.hits}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; the row comes back with what it took."""
        index, before = int(row["shard"]), self._counts()
        part = self.job.shards[index]
        list(self.folder.make_all([index], lambda i: self.make(self.job, part), self.asker))
        spent = {k: v - before[k] for k, v in self._counts().items()}
        return {"shard": index, "queries": part.stop - part.start, **spent}


def make_with_ray(
    job: Job, missing: list[int], make: Maker, how: Execution, progress: Progress
) -> Tally:
    """Make the missing shards with a pool of ``how.workers`` actors; returns what they spent.
    Each reserves ``how.gpus_per_worker`` GPUs, so that those of one machine do not share one.

    Raises:
        UsageError: Ray is not installed, or the cluster has too few GPUs.
        LeverError: a worker failed; shards finished before are kept.
    """
    tally, done = Tally(), 0.0
    total = float(sum(job.shards[i].stop - job.shards[i].start for i in missing))
    given = (job.request, store_name(job.store.path), job.spec.run_id(), job.spec.kind, make)
    for row in spread(ShardWorker, given, [{"shard": i} for i in missing], how):
        done += row["queries"]
        for name in ("wanted", "asked", "hits"):
            setattr(tally, name, getattr(tally, name) + row[name])
        progress(done, total, f"{tally.asked:,} asked, {tally.hits:,} cached")
    return tally
