"""Groups of candidates → padded tensors, and the vectors they name.

In go a :class:`~lever_data.relations.snapshot.Snapshot`, the order of its groups and the pools; out
come :class:`Batch` objects of ``batch_size`` groups of any size.
Pointers become pool positions strictly: an id outside the pool, a repeated id or a wrong length is
an error that names the query. :class:`Loader` collates ahead of the training and holds the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.relations.snapshot import Snapshot
from lever_data.relations.stream import Selection
from lever_train.inputs.pools import Ids, PoolSource, SharedPool
from lever_train.learn.data import TrainingData
from lever_train.selector.model import Pool, vector_lengths

Array = NDArray[Any]
Mask = NDArray[np.bool_]


AHEAD = 3  # batches collated before they are needed
READ = 1_024  # groups read at once
ASKED = 1 << 16  # groups that the disk is asked for at once, before they are needed
COMPARED = 1_000_000  # ids of pools held at once, 8 MB


@dataclass(frozen=True)
class Batch:
    """B groups of at most N candidates of at most S steps over pools of at most K examples."""

    query: Int[Tensor, " B"]  # query ids, rows of the query embeddings
    pool: Int[Tensor, "B K"] | None  # candidate ids, -1 where padded; None: the shared pool
    positions: Int[Tensor, "B N S"]  # pool positions, 0 where padded
    step_mask: Bool[Tensor, "B N S"]
    mask: Bool[Tensor, "B N"]  # real candidates
    reward: Float[Tensor, "B N"]  # float64, 0 where padded
    behaviour: Float[Tensor, "B N"]  # stored log-probabilities, nats; NaN where not known
    accuracy: Float[Tensor, "B N"]  # as stored; NaN where not known
    features: Float[Tensor, "B K F"] | None = None  # of every pair, where the selector reads some

    def __len__(self) -> int:
        return len(self.query)

    def select(self, groups: Int[Tensor, " G"]) -> Batch:
        """Only the groups at these rows."""
        parts: dict[str, Any] = {
            name: value if value is None else value[groups] for name, value in vars(self).items()
        }
        return Batch(**parts)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; float64 becomes float32 where the device lacks it."""
        if device.type == "cpu":
            return self

        def move(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            if device.type == "mps" and value.dtype == torch.float64:
                value = value.float()
            return value.to(device, non_blocking=True)

        return Batch(**{name: move(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class Loader:
    """Reads selections of one :class:`TrainingData`, with its vectors on one device.

    Of several processes each takes every ``world``-th group of every batch, from ``rank``.
    """

    def __init__(
        self,
        data: TrainingData,
        device: torch.device,
        *,
        batch_size: int,
        shot_num: int | None = None,
        can_stop: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.device = data, device
        self.batch_size, self.shot_num, self.can_stop = batch_size, shot_num, can_stop
        self.rank, self.world = rank, world
        self.queries: Float[Tensor, "n d"] = data.queries.to(device)
        self.candidates: Float[Tensor, "m d"] = (
            self.queries if data.candidates is data.queries else data.candidates.to(device)
        )
        self.length = None if data.features is None else vector_lengths(self.candidates)
        self.shared: Pool | None = None
        if isinstance(data.pools, SharedPool):
            ids = torch.from_numpy(data.pools.ids).to(device)
            self.shared = Pool(self.candidates[ids])

    def batches(
        self,
        selection: Selection,
        *,
        order: Literal["random", "file"] = "random",
        seed: int = 0,
        epoch: int = 0,
        skip_groups: int = 0,
        weigh: Callable[[Batch], Float[Tensor, " B"]] | None = None,
    ) -> Iterator[Batch]:
        """This process's share of every batch of one pass, on the CPU.

        A thread reads and collates the next batches, and counts the votes of their pools, while the
        current one trains.

        Args:
            order: ``random`` is a permutation of the groups that depends on (seed, epoch) alone;
                ``file`` is by query.
            skip_groups: groups at the head of the order to leave out: where a resumed run stands.
            weigh: gives each group's weight; a group of weight 0 has no features, which are 0.
        """
        snapshot, con = self.data.snapshot, self.data.con
        groups = snapshot.groups_of(con, selection.queries)
        if order == "random":
            groups = snapshot.order(con, groups, seed=seed, epoch=epoch)
        ready = collate(
            snapshot,
            groups[skip_groups:],
            self.data.pools,
            self.batch_size,
            shot_num=self.shot_num,
            can_stop=self.can_stop,
            rank=self.rank,
            world=self.world,
        )
        if self.data.features is not None:
            ready = (self._with_features(batch, weigh) for batch in ready)
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as worker:
            waiting = deque(worker.submit(next, ready, None) for _ in range(AHEAD))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(worker.submit(next, ready, None))
                yield batch

    def vectors(self, batch: Batch) -> tuple[Float[Tensor, "B d"], Pool]:
        """What the selector reads for a batch on the device: its queries and their pools."""
        query = self.queries[batch.query]
        if self.shared is not None:
            return query, self.shared
        assert batch.pool is not None
        if self.data.features is None:
            return query, Pool.distinct(self.candidates, batch.pool)
        # rows are read where they lie: nothing is computed of an example alone but its length, and
        # that once, so that a copy of the distinct ones would serve nobody
        real = batch.pool >= 0
        return query, Pool(
            self.candidates,
            batch.pool.clamp(min=0),
            None if bool(real.all()) else real,
            batch.features,
            self.length,
        )

    def _with_features(
        self, batch: Batch, weigh: Callable[[Batch], Float[Tensor, " B"]] | None
    ) -> Batch:
        assert self.data.features is not None and batch.pool is not None
        query, size = batch.query.numpy(), batch.pool.shape[1]
        if weigh is None:
            return replace(batch, features=torch.from_numpy(self.data.features.of(query, size)))
        counts = weigh(batch).numpy() > 0
        found = self.data.features.of(query[counts], size)
        values = np.zeros((len(query), *found.shape[1:]), np.float32)
        values[counts] = found
        return replace(batch, features=torch.from_numpy(values))


def collate(
    snapshot: Snapshot,
    groups: Ids,
    pools: PoolSource,
    batch_size: int,
    *,
    shot_num: int | None = None,
    can_stop: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches of ``batch_size`` groups in their order; the last may be smaller.

    Args:
        groups: numbers of groups of the snapshot.
        pools: what pointers are looked up in.
        shot_num: refuse pointers of another length; ``None``: any length of at least 1.
        can_stop: whether the selector can end a pointer itself: an empty pointer and those shorter
            than ``shot_num`` are candidates as others.
        rank: of ``world`` processes, the one whose share of every batch this is.

    Raises:
        LeverError: a pointer does not fit its pool, or a reward is not finite; it names query,
            candidate and value.
    """
    positions = _SharedPositions(pools.ids) if isinstance(pools, SharedPool) else None
    at_once = max(1, READ // batch_size) * batch_size
    asked = max(1, ASKED // at_once) * at_once
    shares_from = partial(_shares, groups, batch_size, rank, world)
    snapshot.ahead(np.concatenate(shares_from(0, asked)))
    for first in range(0, len(groups), at_once):
        if first % asked == 0:
            snapshot.ahead(np.concatenate(shares_from(first + asked, asked)))
        shares = shares_from(first, at_once)
        records = snapshot.read(np.concatenate(shares))
        for share in shares:
            found = snapshot.groups[share]
            rows = _Rows(found["query_id"], found["size"], records[: int(found["size"].sum())])
            records = records[len(rows.records) :]
            yield _batch(rows, pools, positions, shot_num, can_stop)


def _shares(
    groups: Ids, batch_size: int, rank: int, world: int, first: int, count: int
) -> list[Ids]:
    """One process's groups of each batch among ``count`` groups from ``first`` on; one empty share
    where there are none."""
    part = groups[first : first + count]
    starts = range(0, max(1, len(part)), batch_size)
    return [part[start + rank : start + batch_size : world] for start in starts]


@dataclass(frozen=True)
class _Rows:
    """Groups of the queries ``query`` [B], of ``sizes`` [B] candidates in ``records`` [R]."""

    query: Ids
    sizes: Ids
    records: NDArray[np.void]

    def refuse(self, row: int, problem: str, value: object, hint: str | None = None) -> NoReturn:
        query = np.repeat(self.query, self.sizes)[row]
        candidate = self.records["candidate"][row]
        where = f"query {query}, candidate {candidate}"
        raise LeverError(problem, where=where, value=value, hint=hint)


def _batch(
    rows: _Rows,
    pools: PoolSource,
    shared: _SharedPositions | None,
    shot_num: int | None,
    can_stop: bool,
) -> Batch:
    """Pad the groups of ``rows`` to [B, N, S] and look their pointers up."""
    records, known = rows.records, rows.records.dtype.names or ()
    _require_finite(rows)
    pointer, steps = _padded(rows, shot_num, can_stop)
    pool = None if isinstance(pools, SharedPool) else pools.of(rows.query)
    if shared is not None:
        found = shared(pointer, steps)
    else:
        assert pool is not None
        found = _positions(pointer, steps, np.repeat(np.arange(len(pool)), rows.sizes), pool)
    _require_valid(rows, pointer, steps, found)
    B, N = len(rows.sizes), int(rows.sizes.max(initial=1))
    mask = np.arange(N) < rows.sizes[:, None]
    is_even = bool(mask.all())

    def spread(values: Array, fill: float | bool) -> Tensor:
        if is_even:  # all groups are of one size
            return torch.from_numpy(np.array(values).reshape(B, N, *values.shape[1:]))
        padded = np.full((B, N, *values.shape[1:]), fill, dtype=values.dtype)
        padded[mask] = values
        return torch.from_numpy(padded)

    return Batch(
        query=torch.from_numpy(rows.query.copy()),
        pool=None if pool is None else torch.from_numpy(pool),
        positions=spread(found.clip(min=0), 0),
        step_mask=spread(steps, False),
        mask=torch.from_numpy(mask),
        reward=spread(records["reward"], 0.0),
        behaviour=spread(records["behaviour"], np.nan),
        accuracy=spread(records["score"], np.nan)
        if "score" in known
        else torch.full((B, N), torch.nan, dtype=torch.float64),
    )


def _require_finite(rows: _Rows) -> None:
    finite = np.isfinite(rows.records["reward"])
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        rows.refuse(at, "a reward is not a finite number", float(rows.records["reward"][at]))


def _padded(rows: _Rows, shot_num: int | None, can_stop: bool) -> tuple[Ids, Mask]:
    """Pointers [R, S], -1 where padded, and their step mask [R, S]."""
    lengths = rows.records["length"]
    least = 0 if can_stop else shot_num or 1
    wrong = lengths < least
    if shot_num is not None:
        wrong |= lengths > shot_num
    if wrong.any():
        exact = f"at most {shot_num}" if can_stop else str(shot_num)
        expected = f"at least {least}" if shot_num is None else exact
        at = int(np.flatnonzero(wrong)[0])
        _refuse(rows, at, f"a pointer has the wrong length: {lengths[at]}, not {expected}")
    width = int(lengths.max(initial=1))
    mask = np.arange(width) < lengths[:, None]
    pointer = rows.records["pointer"][:, :width].astype(np.int64)
    pointer[~mask] = -1
    return pointer, mask


class _SharedPositions:
    """Where ids stand in one ascending pool."""

    def __init__(self, ids: Ids) -> None:
        self.last = int(ids.max(initial=-1))
        self.table = np.full(self.last + 2, -1, dtype=np.int64)  # one more for ids beyond
        self.table[ids] = np.arange(len(ids))

    def __call__(self, pointer: Ids, steps: Mask) -> Ids:
        """Positions [R, S]; -1 where padded or not in the pool."""
        inside = steps & (pointer >= 0) & (pointer <= self.last)
        return self.table[np.where(inside, pointer, self.last + 1)]


def _positions(pointer: Ids, steps: Mask, group: Ids, pool: Ids) -> Ids:
    """Positions [R, S] in each group's own pool [B, K]; -1 where padded or not in it."""
    found = np.full(pointer.shape, -1)
    # a look at all K is a fifth of the time of a binary search at K 64, and no more at K 6,000
    at_once = max(1, COMPARED // pool.shape[1])
    for first in range(0, len(pointer), at_once):
        part = slice(first, first + at_once)
        own = pool[group[part]]
        for step in range(pointer.shape[1]):
            same = own == pointer[part, step, None]
            at = same.argmax(axis=1)
            hit = steps[part, step] & same[np.arange(len(same)), at]
            found[part, step] = np.where(hit, at, -1)
    return found


def _require_valid(rows: _Rows, pointer: Ids, steps: Mask, found: Ids) -> None:
    outside = steps & (found < 0)
    if outside.any():
        at, step = (int(i[0]) for i in np.nonzero(outside))
        _refuse(rows, at, f"a pointer leaves the query's pool: {pointer[at, step]} is not in it")
    repeated = np.zeros(len(pointer), dtype=bool)
    for apart in range(1, pointer.shape[1]):
        same = (pointer[:, apart:] == pointer[:, :-apart]) & steps[:, apart:]
        repeated |= same.any(axis=1)
    if repeated.any():
        _refuse(rows, int(np.flatnonzero(repeated)[0]), "a pointer names one example twice")


def _refuse(rows: _Rows, row: int, problem: str) -> NoReturn:
    record = rows.records[row]
    hint = "`lever query` shows the row; --pool FILE.npy gives the pool the data was made with"
    rows.refuse(row, problem, record["pointer"][: record["length"]].tolist(), hint)
