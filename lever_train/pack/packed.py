"""A packed selector, asked for demonstrations.

In go vectors of questions, or texts where the pack names its encoder; out come lists of
:class:`Pick`. transformers is not imported where vectors are given, and DuckDB only where the
selector reads features of pairs. Picks are those of ``lever eval``: the same search over the same
scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from lever_data.errors import LeverError, UsageError, reason
from lever_train.pack.cells import Cells
from lever_train.pack.inputs import Inputs, Questions, is_texts
from lever_train.pack.near import Near, is_one_pool
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.model import (
    AttentionSelector,
    History,
    Pool,
    StaticSelector,
    vector_lengths,
)

if TYPE_CHECKING:
    from lever_train.pack.features import PackedFeatures, Vectors

_KEPT = 1 << 29  # bytes of what is kept of all examples beside their vectors
_QUERIES = 64  # at once where [B, K, h] is made of them: more would leave the cache
_FEW = 8  # questions that one thread answers sooner than two
_BLOCK = 256  # questions a thread takes at once
_ROWS = 1 << 12  # examples of which it is made at once

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pick:
    """One demonstration: its id in the pool, the example itself (question, answer, …), and the
    log-probability of choosing it at its step, in nats."""

    id: int
    example: dict[str, Any]
    log_prob: float


class PackedSelector:
    """A selector, the examples it may show, and their vectors.

    ``examples``: a table with ``example_id`` and what else is known of each. ``vectors``: [n, d]
    float32, in the order of the examples. ``pool_size``: how many of the most similar a query
    chooses among; ``None``: all. ``encoder``: what texts are embedded with, where it is known.
    ``features``: what it reads of pairs beside the vectors. ``cells``: where the most similar are
    looked for; ``None``: everywhere.
    """

    def __init__(
        self,
        policy: SelectorPolicy,
        examples: pa.Table,
        vectors: Tensor,
        *,
        pool_size: int | None,
        encoder: dict[str, str] | None = None,
        features: PackedFeatures | None = None,
        cells: Cells | None = None,
    ) -> None:
        self._policy = policy
        self.examples, self.vectors = examples, vectors
        self.pool_size, self.encoder, self.features = pool_size, encoder, features
        self.cells = cells
        self._inputs = Questions(policy.selector.dim, encoder)
        self._last: tuple[Ids, Pool] | None = None
        self._ids = examples.column("example_id").to_numpy()
        self._order = np.argsort(self._ids, kind="stable")
        self._near = Near(normalize(vectors, dim=-1), cells)
        # in one piece each, of which a row is read in a sixth of the time of taking it of a table
        names = examples.column_names
        self._columns = [(name, examples.column(name).combine_chunks()) for name in names]

    @property
    def name(self) -> str:
        """The checkpoint's file name and the head of its digest."""
        return self._policy.name

    @cached_property
    def _every(self) -> Pool | None:
        """All examples, with what is computed of each once: most of the arithmetic of a question.
        ``None`` where there are too many."""
        selector = self._policy.selector
        if 8 * len(self.vectors) * (self.dim + selector.config.hidden) > _KEPT:
            return None
        vectors, units = self.vectors.double(), None
        if isinstance(selector, AttentionSelector):
            parts = torch.split(vectors, _ROWS)
            units = torch.cat([selector.units(Pool(part)) for part in parts])
        return Pool(vectors, length=vector_lengths(vectors), units=units)

    @property
    def dim(self) -> int:
        """d, the width of a vector."""
        return self._policy.selector.dim

    def select(
        self,
        inputs: Inputs,
        k: int | None = None,
        *,
        pools: npt.ArrayLike | None = None,
        spaces: Vectors | None = None,
    ) -> Any:
        """Choose demonstrations, in the order they are to be shown.

        Args:
            inputs: one question or several: texts, items with the fields that the encoder's
                template names, or vectors [d] or [B, d].
            k: how many; ``None``: the selector stops by itself, which kind ``stop`` can.
            pools: [B, K] ids of the examples each question may be shown, -1 where padded; in place
                of the most similar ones.
            spaces: by name the questions' vectors [B, d] in further spaces that features read.

        Returns:
            list of Pick for one question, a list of such lists for several.

        Raises:
            UsageError: vectors of another width, ``k`` without which the selector cannot do, or
                that is more than a pool holds; a text, and the pack knows no encoder; a space that
                a feature reads is not given.
            LeverError: a pool names an example that is not in the pack.
        """
        queries = self._inputs.vectors(inputs)
        if not len(queries):
            return []
        rows = self._nearest(queries) if pools is None else self._rows(pools, len(queries))
        shots = self._shots(k, rows.shape[1])
        found = self._picked(queries, rows, shots, spaces or {}, can_stop=k is None)
        given: Any = inputs
        is_one = isinstance(given, str | dict) or (not is_texts(given) and np.ndim(given) == 1)
        return found[0] if is_one else found

    def add_examples(
        self,
        examples: Sequence[dict[str, Any]],
        vectors: npt.ArrayLike | Tensor | None = None,
        *,
        spaces: Vectors | None = None,
    ) -> PackedSelector:
        """A selector that may show these examples too; nothing is trained.

        Args:
            examples: each with an ``example_id`` of its own and the fields it is shown with.
            vectors: [m, d]; ``None``: their questions through the pack's encoder.
            spaces: by name their vectors [m, d] in further spaces that features read.

        Raises:
            UsageError: an id that is there already, or vectors that do not fit.
        """
        given = [example.get("example_id") for example in examples]
        known = set(self.examples.column("example_id").to_pylist())
        for place, number in enumerate(given):
            if not isinstance(number, int | np.integer) or number < 0:
                raise UsageError("an example needs an example_id from 0 on", value=number)
            if number in known or number in given[:place]:
                raise UsageError("there is an example of this id already", value=number)
        fields = set(self.examples.column_names)
        for example in examples:
            if unknown := set(example) - fields:
                raise UsageError(
                    "an example has a field that the pack has not",
                    value=sorted(unknown)[0],
                    hint=f"fields: {', '.join(sorted(fields))}",
                )
        if vectors is None:
            vectors = self._inputs.texts(examples)
        more = self._inputs.checked(vectors)
        if len(more) != len(examples):
            raise UsageError("a vector an example is needed", value=f"{len(more)}, {len(given)}")
        try:
            rows = pa.Table.from_pylist(list(examples), schema=self.examples.schema)
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(f"an example does not fit the others ({reason(error)})") from None
        table = pa.concat_tables([self.examples, rows])
        # by id, as a pack is: of equally similar examples the lower id is the nearer one
        order = np.argsort(table.column("example_id").to_numpy(), kind="stable")
        features = self.features
        if features is not None:
            features = features.with_more(spaces or {}, len(more), order)
        return PackedSelector(
            self._policy,
            table.take(pa.array(order)),
            torch.cat([self.vectors, more])[torch.from_numpy(order)],
            pool_size=self.pool_size,
            encoder=self.encoder,
            features=features,
            cells=None if self.cells is None else self.cells.with_more(normalize(more), order),
        )

    def _shots(self, k: int | None, room: int) -> int:
        selector = self._policy.selector
        if k is None:
            if not selector.config.ends_pointers:
                raise UsageError(
                    f"a {selector.config.selector} selector does not stop by itself: say how many",
                    hint="select(…, k=2)",
                )
            return min(selector.config.max_shots, room)
        if not isinstance(k, int | np.integer) or not 1 <= k <= room:
            raise UsageError(f"k is from 1 to {room}, the size of a pool", value=k)
        return k

    def _nearest(self, queries: Tensor) -> Ids:
        """Rows [B, K] of each query's pool: the most similar, or all in order of their ids."""
        n = len(self._ids)
        if self.pool_size is None or self.pool_size >= n:
            return np.broadcast_to(self._order, (len(queries), n))
        return self._near.rows(normalize(queries, dim=-1), self.pool_size)

    def _rows(self, pools: npt.ArrayLike, queries: int) -> Ids:
        given = np.asarray(pools)
        if given.dtype.kind not in "iu":
            raise UsageError("pools are ids, which are integers", value=str(given.dtype))
        ids = given.astype(np.int64)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or len(ids) != queries:
            raise UsageError(
                "pools are [B, K], a row a question", value=f"{list(ids.shape)} for {queries}"
            )
        at = np.searchsorted(self._ids, ids, sorter=self._order).clip(max=len(self._ids) - 1)
        rows = self._order[at]
        is_wrong = (self._ids[rows] != ids) & (ids >= 0)
        if is_wrong.any():
            raise LeverError(
                "a pool names an example that the pack does not hold", value=int(ids[is_wrong][0])
            )
        found = np.where(ids >= 0, rows, -1)
        twice = np.diff(np.sort(found), axis=1) == 0
        if (twice & (np.sort(found)[:, 1:] >= 0)).any():
            raise UsageError("a pool names an example twice, so that it could be shown twice")
        return found

    def _picked(
        self, queries: Tensor, rows: Ids, shots: int, spaces: Vectors, *, can_stop: bool
    ) -> list[list[Pick]]:
        room = int((rows >= 0).sum(1).min())
        if room < shots and not can_stop:
            raise UsageError("a pool holds fewer demonstrations than are asked for", value=room)
        given = {} if self.features is None else self.features.of_queries(spaces, len(rows))

        def choose(start: int) -> tuple[Ids, Values]:
            part = slice(start, start + _BLOCK)
            there = {name: vectors[part] for name, vectors in given.items()}
            return self._choose(queries[part], rows[part], there, shots, can_stop=can_stop)

        starts, threads = range(0, len(rows), _BLOCK), torch.get_num_threads()
        # each of its threads takes blocks of its own: two that share one wait for each other
        # longer than they work, of few questions and of a block's small operations alike
        workers = min(threads, len(starts))
        torch.set_num_threads(1 if workers > 1 or len(rows) <= _FEW else threads)
        try:
            first = choose(0)  # what all share is made here, once
            alone = partial(torch.set_num_threads, 1)
            with ThreadPoolExecutor(workers, initializer=alone) as each:
                found = [first, *each.map(choose, starts[1:])]
        finally:
            torch.set_num_threads(threads)
        chosen, log_probs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._shown(chosen, log_probs, rows)

    @torch.inference_mode()
    def _choose(
        self, queries: Tensor, rows: Ids, spaces: Vectors, shots: int, *, can_stop: bool
    ) -> tuple[Ids, Values]:
        """Positions [B, S] in the pools and their log-probabilities."""
        values, closed = None, torch.from_numpy(rows < 0)
        if self.features is not None:
            values = self.features.values(queries, rows, self.examples, self.vectors, spaces)
        step = len(rows) if isinstance(self._policy.selector, StaticSelector) else _QUERIES
        found = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            pool = self._pool(rows[part])
            if values is not None:
                pool = replace(pool, features=values[part].double())
            history, shut = self._policy.begin(queries[part].double(), pool), closed[part]
            if history.stops:
                shut = pad(shut, (0, 1), value=not can_stop)
            found.append(_greedy(history, shut, shots))
        chosen, log_probs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return chosen, log_probs

    def _pool(self, rows: Ids) -> Pool:
        """The candidates of these pools; one that all questions share is kept until another is
        asked for."""
        every, last, is_one = self._every, self._last, is_one_pool(rows)
        filled = np.where(rows < 0, rows.max(), rows)
        if is_one and last is not None and np.array_equal(last[0], rows[0]):
            pool = last[1]  # read once: another thread may ask for another pool meanwhile
        elif every is not None and not is_one:
            pool = replace(every, index=torch.from_numpy(filled))
        else:
            used, index = filled[0], None
            if not is_one:
                used, at = np.unique(filled, return_inverse=True)
                index = torch.from_numpy(at.reshape(rows.shape))
            here = torch.from_numpy(used)
            vectors = self.vectors[here].double()
            units = None if every is None or every.units is None else every.units[here]
            pool = Pool(vectors, index, length=vector_lengths(vectors), units=units)
            if is_one:
                self._last = rows[0], pool
        real = torch.from_numpy(rows >= 0)
        return pool if bool(real.all()) else replace(pool, mask=real)

    def _shown(self, chosen: Ids, log_probs: Values, rows: Ids) -> list[list[Pick]]:
        """Picks of positions [B, S]; a position beyond the pool ended the sequence."""
        goes_on = np.logical_and.accumulate(chosen < rows.shape[1], axis=1)
        found = np.take_along_axis(rows, np.where(goes_on, chosen, 0), 1)
        shown = {
            row: {name: column[row].as_py() for name, column in self._columns}
            for row in set(found[goes_on].tolist())
        }
        picks: list[list[Pick]] = [[] for _ in chosen]
        for query, row, value in zip(
            np.nonzero(goes_on)[0].tolist(), found[goes_on].tolist(), log_probs[goes_on].tolist(),
            strict=True,
        ):  # fmt: skip
            picks[query].append(Pick(shown[row]["example_id"], shown[row], value))
        return picks


def _greedy(start: History, closed: Tensor, shots: int) -> tuple[Ids, Values]:
    """Positions [B, S] and the log-probability of each at its step; what follows an end counts for
    nothing.

    The search of ``propose.beams`` with one beam: the rounded sum decides, among equals the lower
    position wins.
    """
    taken, history = closed[:, None, :], start
    total = torch.zeros((len(closed), 1), dtype=torch.float64)
    parent = torch.zeros((len(closed), 1), dtype=torch.long)
    chosen, log_probs = [], []
    for step in range(shots):
        log_p = history.scores().masked_fill(taken, float("-inf")).log_softmax(-1)[:, 0]
        total, pick = (total + log_p).round(decimals=9).max(-1, keepdim=True)
        chosen.append(pick)
        log_probs.append(log_p.gather(1, pick))
        if step + 1 < shots:
            taken = taken.scatter(2, pick[..., None], True)
            history = history.advance(parent, pick)
    return torch.cat(chosen, 1).numpy(), torch.cat(log_probs, 1).numpy()
