"""Shards on Ray Data: a pool of actors, each with the answerer loaded once.

In go a resolved job and the numbers of its missing shards; the actors resolve the same request
against the same store (a bucket, or a file system all of them see), check that they mean the same
run, and write the same shards a local process would. Only shard numbers and tallies travel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from lever_data.errors import LeverError, UsageError
from lever_train.options.rollout import Execution, Request
from lever_train.rollout.ask import Tally
from lever_train.rollout.job import Job, new_asker, shard_folder
from lever_train.rollout.resolve import resolve

Progress = Callable[[float, float | None, str], None]


class ShardWorker:
    """An actor that makes shards of one request."""

    def __init__(self, request: Request, run: str) -> None:
        self.job = resolve(request)
        if self.job.spec.run_id() != run:
            raise LeverError(
                "a worker sees other data than the driver; the store must be in a bucket or on a "
                "shared file system, and must not change under a job",
                value=f"{self.job.spec.run_id()} instead of {run}",
            )
        self.folder = shard_folder(self.job)
        self.asker = new_asker(self.job)

    def _counts(self) -> dict[str, int]:
        tally = self.asker.tally
        return {"wanted": tally.wanted, "asked": tally.asked, "hits": tally.hits}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; the row comes back with what it took."""
        from lever_train.rollout.work import make_shard

        index, before = int(row["shard"]), self._counts()
        part = self.job.shards[index]
        list(self.folder.make_all([index], lambda i: make_shard(self.job, part), self.asker))
        spent = {k: v - before[k] for k, v in self._counts().items()}
        return {"shard": index, "queries": part.stop - part.start, **spent}


def make_with_ray(job: Job, missing: list[int], how: Execution, progress: Progress) -> Tally:
    """Make the missing shards with a pool of ``how.workers`` actors; returns what they spent.
    Each reserves ``how.gpus_per_worker`` GPUs, so that those of one machine do not share one.

    Starts a local Ray where none is connected (``ray.init`` reads ``RAY_ADDRESS``).

    Raises:
        UsageError: Ray is not installed.
        LeverError: a worker failed; shards finished before are kept.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray", hint="pip install 'lever[ray]'") from None
    tally, done = Tally(), 0.0
    total = float(sum(job.shards[i].stop - job.shards[i].start for i in missing))
    if not missing:
        return tally
    # Ray and its workers print as they like; stdout is for the result alone
    with redirect_stdout(sys.stderr), _connected(ray):
        ray.data.DataContext.get_current().enable_progress_bars = False
        _require_gpus(ray, how)
        rows = [{"shard": i} for i in missing]
        # one block per shard, so that shards spread evenly and a lost worker costs one shard
        made = ray.data.from_items(rows, override_num_blocks=len(missing)).map(
            ShardWorker,
            fn_constructor_args=(job.request, job.spec.run_id()),
            compute=ray.data.ActorPoolStrategy(size=min(how.workers, len(missing))),
            num_gpus=how.gpus_per_worker or None,
        )
        try:
            for row in made.iter_rows():
                done += row["queries"]
                for name in ("wanted", "asked", "hits"):
                    setattr(tally, name, getattr(tally, name) + row[name])
                progress(done, total, f"{tally.asked:,} asked, {tally.hits:,} cached")
        except ray.exceptions.RayError as error:
            raise _worker_error(error) from error
    return tally


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """A Ray that is there, or one of our own as long as the context."""
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level="warning", include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _require_gpus(ray: Any, how: Execution) -> None:
    """Refuse what would wait for ever: an actor for which no machine has the GPUs."""
    there = ray.cluster_resources().get("GPU", 0.0)
    if how.workers * how.gpus_per_worker > there:
        raise UsageError(
            "the cluster has too few GPUs for so many workers",
            value=f"{how.workers} x {how.gpus_per_worker:g}, and Ray sees {there:g}",
            hint="lower --workers or --gpus-per-worker",
        )


def _worker_error(error: BaseException) -> LeverError:
    """The error a worker raised, as it raised it where it was one of ours."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LeverError):
            return LeverError(cause.what, where=cause.where, value=cause.value, hint=cause.hint)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return LeverError(f"a Ray worker failed ({error})", hint="finished shards are kept; run again")
