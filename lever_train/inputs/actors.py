"""Workers on a Ray cluster: a pool of actors, each of which loads once and does many parts.

In go a class, what it is made from, and rows that say which part; out come the rows that its
objects make of them, in any order. A worker that is lost is started again, and its part with it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from lever_data.errors import LeverError, UsageError
from lever_train.options.engine import Engine

Row = dict[str, Any]
_LOG = logging.getLogger("lever.workers")  # on stderr, where nobody handles it otherwise


def spread(
    worker: Callable[..., Callable[[Row], Row]],
    given: tuple[object, ...],
    rows: Sequence[Row],
    how: Engine,
) -> Iterator[Row]:
    """What the workers make of the rows, each as it comes.

    Args:
        worker: a class whose objects are called with a row; made once in each actor.
        given: what it is made from; it travels, so it can be pickled.
        rows: at most as many actors as rows are started.

    Raises:
        UsageError: Ray is not installed, or the cluster has too few GPUs.
        LeverError: a worker failed, with what it raised.
    """
    if not rows:
        return
    with cluster(how) as ray:
        # one block per row, so that rows spread evenly and a lost worker costs one of them
        made = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=given,
            compute=ray.data.ActorPoolStrategy(size=min(how.workers, len(rows))),
            num_gpus=how.gpus_per_worker or None,
        )
        yield from made.iter_rows()


@contextmanager
def cluster(how: Engine) -> Iterator[Any]:
    """Ray, connected: a cluster that is there, that which RAY_ADDRESS names, or one of our own as
    long as the context. Ray and its workers print as they like; stdout is for the result alone.

    Raises:
        UsageError: Ray is not installed, or the cluster has too few GPUs: an actor for which no
            machine has them would wait for ever.
        LeverError: a worker failed, with what it raised.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray", hint="pip install 'lever[ray]'") from None
    is_ours = not ray.is_initialized()
    with redirect_stdout(sys.stderr):
        if is_ours:
            ray.init(logging_level="warning", include_dashboard=False)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            there = ray.cluster_resources().get("GPU", 0.0)
            if how.workers * how.gpus_per_worker > there:
                raise UsageError(
                    "the cluster has too few GPUs for so many workers",
                    value=f"{how.workers} x {how.gpus_per_worker:g}, and Ray sees {there:g}",
                    hint="lower --workers or --gpus-per-worker",
                )
            machines = _machines(ray)
            yield ray
            if lost := len(machines - _machines(ray)):
                _LOG.warning(
                    "lost %d of %d machines of the cluster; what was in work there, others did "
                    "again",
                    *(lost, len(machines)),
                )
        except ray.exceptions.RayError as error:
            raise _of_worker(error) from error
        finally:
            if is_ours:
                ray.shutdown()


def _machines(ray: Any) -> set[str]:
    """Those that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _of_worker(error: BaseException) -> LeverError:
    """The error a worker raised, as it raised it where it was one of ours."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LeverError):
            return LeverError(cause.what, where=cause.where, value=cause.value, hint=cause.hint)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return LeverError(f"a Ray worker failed ({error})", hint="what is finished is kept; run again")
