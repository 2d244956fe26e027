"""Arrow record batches → padded tensors, and the vectors they name.

In go the record batches of ``lever_data.relations.stream.scan`` (whole groups, rows of a group
together) and the pools; out come :class:`Batch` objects of ``batch_size`` groups of any size.
Pointers become pool positions strictly: an id outside the pool, a repeated id or a wrong length is
an error that names the query. :class:`Loader` collates ahead of the training and holds the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.relations.stream import Selection, group_starts, scan
from lever_train.inputs.pools import Ids, PoolSource, SharedPool
from lever_train.learn.data import TrainingData
from lever_train.selector.model import Pool

Array = NDArray[Any]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


AHEAD = 3  # batches collated before they are needed


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
        self.shared: Pool | None = None
        if isinstance(data.pools, SharedPool):
            ids = torch.from_numpy(data.pools.ids).to(device)
            self.shared = Pool(self.candidates[ids])

    def batches(self, selection: Selection, **position: Any) -> Iterator[Batch]:
        """This process's share of every batch of one pass, on the CPU.

        ``position`` as :func:`scan` takes it: order, seed, epoch, skip_groups. A thread reads and
        collates the next batches while the current one trains.
        """
        stream = scan(self.data.con, selection, **position)
        ready = collate(
            stream,
            self.data.pools,
            self.batch_size,
            shot_num=self.shot_num,
            can_stop=self.can_stop,
            rank=self.rank,
            world=self.world,
        )
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
        pool = Pool.distinct(self.candidates, batch.pool)
        if self.data.features is not None:
            values = self.data.features.of(batch.query.cpu().numpy(), pool.size)
            pool = replace(pool, features=torch.from_numpy(values).to(self.device))
        return query, pool


def collate(
    stream: Iterable[pa.RecordBatch],
    pools: PoolSource,
    batch_size: int,
    *,
    shot_num: int | None = None,
    can_stop: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Cut the stream of ``stream.scan`` into batches of ``batch_size`` groups; the last may be
    smaller.

    Args:
        pools: what pointers are looked up in.
        shot_num: refuse pointers of another length; ``None``: any length of at least 1.
        can_stop: whether the selector can end a pointer itself: an empty pointer and those shorter
            than ``shot_num`` are candidates as others.
        rank: of ``world`` processes, the one whose share of every batch this is.

    Raises:
        LeverError: a pointer does not fit its pool; it names query, candidate and pointer.
    """
    held: pa.Table | None = None
    for batch in stream:
        table = pa.Table.from_batches([batch])
        held = table if held is None else pa.concat_tables([held, table])
        rows = _Rows.of(held.combine_chunks())
        whole = len(rows) // batch_size * batch_size
        for first in range(0, whole, batch_size):
            yield _batch(
                rows.groups(first + rank, first + batch_size, world), pools, shot_num, can_stop
            )
        held = held.slice(int(rows.starts[whole]))
    if held is not None and held.num_rows:
        rows = _Rows.of(held.combine_chunks())
        yield _batch(rows.groups(rank, len(rows), world), pools, shot_num, can_stop)


@dataclass(frozen=True)
class _Rows:
    """Candidates as flat arrays; group g is rows ``starts[g]`` to ``starts[g + 1]``."""

    starts: Ids
    query: Ids
    candidate: Ids
    pointer: Ids
    offsets: Ids  # pointer of row r: pointer[offsets[r]:offsets[r + 1]]
    reward: Floats
    behaviour: Floats
    accuracy: Floats

    @classmethod
    def of(cls, table: pa.Table) -> _Rows:
        pointers = table.column("pointer").chunk(0)
        lengths = pointers.value_lengths().to_numpy(zero_copy_only=False)
        known = "vqa_acc_score" in table.column_names
        behaviour = _floats(table.column("logprob_score"))
        return cls(
            starts=np.append(group_starts(table), table.num_rows),
            query=table.column("query_id").to_numpy(),
            candidate=table.column("candidate").to_numpy().astype(np.int64),
            pointer=pointers.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            reward=_floats(table.column("reward")),
            behaviour=behaviour,
            accuracy=_floats(table.column("vqa_acc_score"))
            if known
            else np.full_like(behaviour, np.nan),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def groups(self, first: int, last: int, step: int) -> _Rows:
        """Every ``step``-th group of those from ``first`` to before ``last``."""
        chosen = np.arange(first, last, step)
        sizes = self.starts[chosen + 1] - self.starts[chosen]
        rows = _ranges(self.starts[chosen], sizes)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        return _Rows(
            starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            query=self.query[rows],
            candidate=self.candidate[rows],
            pointer=self.pointer[_ranges(self.offsets[rows], lengths)],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            reward=self.reward[rows],
            behaviour=self.behaviour[rows],
            accuracy=self.accuracy[rows],
        )


def _batch(rows: _Rows, pools: PoolSource, shot_num: int | None, can_stop: bool) -> Batch:
    """Pad the groups of ``rows`` to [B, N, S] and look their pointers up."""
    sizes = np.diff(rows.starts)
    B, N = len(sizes), int(sizes.max(initial=1))
    group = np.repeat(np.arange(B), sizes)
    ordinal = np.arange(len(group)) - rows.starts[:-1][group]
    pointer, steps = _padded(rows, shot_num, can_stop)
    query = rows.query[rows.starts[:-1]]
    pool: Ids | None = None
    if isinstance(pools, SharedPool):
        found = _shared_positions(pointer, steps, pools.ids)
    else:
        pool = pools.of(query)
        found = _positions(pointer, steps, group, query, pool)
    _require_valid(rows, pointer, steps, found)

    def spread(values: Array, fill: float | bool) -> Tensor:
        padded = np.full((B, N, *values.shape[1:]), fill, dtype=values.dtype)
        padded[group, ordinal] = values
        return torch.from_numpy(padded)

    return Batch(
        query=torch.from_numpy(query.copy()),
        pool=None if pool is None else torch.from_numpy(pool),
        positions=spread(found.clip(min=0), 0),
        step_mask=spread(steps, False),
        mask=spread(np.ones(len(group), dtype=bool), False),
        reward=spread(rows.reward, 0.0),
        behaviour=spread(rows.behaviour, np.nan),
        accuracy=spread(rows.accuracy, np.nan),
    )


def _padded(rows: _Rows, shot_num: int | None, can_stop: bool) -> tuple[Ids, Mask]:
    """Pointers [R, S], -1 where padded, and their step mask [R, S]."""
    lengths = np.diff(rows.offsets)
    least = 0 if can_stop else shot_num or 1
    wrong = lengths < least
    if shot_num is not None:
        wrong |= lengths > shot_num
    if wrong.any():
        exact = f"at most {shot_num}" if can_stop else str(shot_num)
        expected = f"at least {least}" if shot_num is None else exact
        at = int(np.flatnonzero(wrong)[0])
        _refuse(rows, at, f"a pointer has the wrong length: {lengths[at]}, not {expected}")
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    pointer = np.full(mask.shape, -1, dtype=np.int64)
    pointer[mask] = rows.pointer
    return pointer, mask


def _shared_positions(pointer: Ids, steps: Mask, ids: Ids) -> Ids:
    """Positions [R, S] in one ascending pool; -1 where padded or not in it."""
    at = np.searchsorted(ids, pointer).clip(max=len(ids) - 1)
    return np.where(steps & (ids[at] == pointer), at, -1)


def _positions(pointer: Ids, steps: Mask, group: Ids, query: Ids, pool: Ids) -> Ids:
    """Positions [R, S] in each group's own pool [B, K]; -1 where padded or not in it."""
    # one sorted array for all pools: ids of row b live in [b·width, (b + 1)·width)
    width = max(int(pool.max(initial=0)), int(pointer.max(initial=0))) + 2
    order = np.argsort(pool, axis=1, kind="stable")
    ranked = np.take_along_axis(pool, order, 1)
    repeated = ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise LeverError(
            "a candidate pool holds an example twice", where=f"query {query[repeated][0]}"
        )
    base = np.arange(len(pool))[:, None] * width + 1
    keys = (ranked + base).ravel()
    wanted = pointer + base[group]
    at = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
    return np.where(steps & (keys[at] == wanted), order.ravel()[at], -1)


def _require_valid(rows: _Rows, pointer: Ids, steps: Mask, found: Ids) -> None:
    outside = steps & (found < 0)
    if outside.any():
        at, step = (int(i[0]) for i in np.nonzero(outside))
        _refuse(rows, at, f"a pointer leaves the query's pool: {pointer[at, step]} is not in it")
    # padding gets negative values of its own, so that only real ids can be equal
    filled = np.sort(np.where(steps, pointer, -1 - np.arange(pointer.shape[1])), axis=1)
    repeated = (filled[:, 1:] == filled[:, :-1]).any(axis=1)
    if repeated.any():
        _refuse(rows, int(np.flatnonzero(repeated)[0]), "a pointer names one example twice")


def _refuse(rows: _Rows, row: int, problem: str) -> NoReturn:
    raise LeverError(
        problem,
        where=f"query {rows.query[row]}, candidate {rows.candidate[row]}",
        value=rows.pointer[rows.offsets[row] : rows.offsets[row + 1]].tolist(),
        hint="`lever query` shows the row; --pool FILE.npy gives the pool the data was made with",
    )


def _ranges(starts: Ids, sizes: Ids) -> Ids:
    """The numbers starts[i], …, starts[i] + sizes[i] - 1 for every i, in one array."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _floats(column: pa.ChunkedArray) -> Floats:
    """A column as float64, null as NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
