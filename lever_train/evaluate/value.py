"""``value``: what reward a new selector would earn, from candidates that others proposed.

In go a :class:`ValueRequest`; out comes a :class:`Value` per checkpoint: nothing is asked of any
model. A query's value is that of drawing pointers from the selector at temperature 1, estimated
three ways (Dudík, Langford & Li 2011): by importance weights that are normalised within the query
(SNIPS), by a model of the reward (direct), and by both (doubly robust), each averaged over queries.

The model of the reward is a query's own level, plus one slope times the mean similarity of the
demonstrations shown, plus their mean effect, each estimated from the other queries that the
example was shown to and shrunk towards none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lever_data.errors import LeverError, UsageError
from lever_data.report.statistics import Interval, bootstrap_mean, effective_sample_size
from lever_train.inputs.check import Vectors, require_width
from lever_train.inputs.devices import open_device
from lever_train.inputs.pools import SharedPool
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.data import open_data
from lever_train.options.rollout import Recipe
from lever_train.options.train import DataConfig, RunConfig, Source, TrainConfig
from lever_train.options.value import ValueRequest
from lever_train.rollout.propose import samples
from lever_train.selector.checkpoint import load_selector
from lever_train.selector.model import SCORE_TEMPERATURE, Pool, Selector, cosine_scores

_SHRINK = 10.0  # as many times must an example have been shown for half of its effect to count
_DRAWS = 16  # of the selector, for the direct part at two and more demonstrations

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """Of one checkpoint, each with its 95 % interval, queries resampled.

    ``support``: mean importance weight, 1 where the stored candidates cover what the selector
    would show, less where they do not. ``effective``: mean effective number of candidates per
    query (Kong 1992).
    """

    checkpoint: str
    snips: Interval
    direct: Interval
    doubly_robust: Interval
    support: float
    effective: float
    queries: int


def value(request: ValueRequest) -> list[Value]:
    """The values of all checkpoints, in their order.

    Raises:
        UsageError: candidates of several lengths, none with a log-probability, or beams that are
            to count as draws.
        LeverError: nothing is stored, vectors do not fit, or too little is stored of what a
            selector would show.
    """
    device = open_device(request.device)
    config = TrainConfig(
        data=_drawn(request).but(split_ratio=1.0, order="file"),
        reward=request.reward,
        run=RunConfig(batch_size=request.batch_size, device=request.device),
    )
    data = open_data(
        Source(store=request.store, runs=request.runs, sql_dir=request.sql_dir), config
    )
    loader = Loader(data, device, batch_size=request.batch_size)
    selectors = [load_selector(path)[0].to(loader.device) for path in request.checkpoints]
    require_width(
        Vectors.of(request.data.query_embeddings, data.queries),
        {str(path): s.dim for path, s in zip(request.checkpoints, selectors, strict=True)},
    )
    model = _Model(loader)
    parts = [[_batch(s, model, batch, request) for s in selectors] for batch in _passes(loader)]
    return [
        _value(path, np.concatenate(figures, axis=1), request)
        for path, figures in zip(request.checkpoints, zip(*parts, strict=True), strict=True)
    ]


def _drawn(request: ValueRequest) -> DataConfig:
    """What is read: of candidates with a stored log-probability only those that were drawn by it.
    A beam is the best there is, and no draw."""
    data = request.data
    if request.behaviour == "uniform":
        return data
    if "beam" in data.gen_method:
        raise UsageError(
            "beams were not drawn: their log-probability says nothing of how they came here",
            value=", ".join(data.gen_method),
            hint="--gen-method sample, or --behaviour uniform where whole pools are stored",
        )
    return data if data.gen_method else data.but(gen_method=("sample",))


def _passes(loader: Loader) -> Iterator[Batch]:
    yield from loader.batches(loader.data.train, order="file", seed=0, epoch=0)


class _Model:
    """Effects of the examples of a pool: ``slope`` times their similarity, and what each is worth
    by itself, from ``sums`` and ``counts`` by example id of what was left of the reward."""

    def __init__(self, loader: Loader) -> None:
        pools = loader.data.pools
        self.loader = loader
        self.shared = pools.ids if isinstance(pools, SharedPool) else None
        self.slope = 0.0
        rows = len(loader.data.candidates)
        self.sums, self.counts = np.zeros(rows), np.zeros(rows)
        self._fit_slope()
        self._fit_examples()

    def ids(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Example ids [B, K] of the pools, -1 where padded."""
        if batch.pool is not None:
            return batch.pool.numpy()
        assert self.shared is not None
        return np.broadcast_to(self.shared, (len(batch), len(self.shared)))

    def effects(self, batch: Batch) -> Tensor:
        """Effects [B, K] of the pool's examples, without what the query itself tells of them."""
        ids, similar = self.ids(batch).clip(min=0), self._similar(batch)
        own_sums, own_counts = self._own(batch, similar)
        sums, counts = self.sums[ids] - own_sums.numpy(), self.counts[ids] - own_counts.numpy()
        return self.slope * similar + torch.from_numpy(sums / (counts + _SHRINK))

    def _fit_slope(self) -> None:
        """Least squares of the reward on the similarity, both around their means in the query."""
        product = square = 0.0
        for batch in _passes(self.loader):
            _require_one_length(batch)
            x, y = (
                _centred(v, batch.mask) for v in (_shown(self._similar(batch), batch), batch.reward)
            )
            product, square = product + float((x * y).sum()), square + float((x * x).sum())
        self.slope = product / square if square else 0.0

    def _fit_examples(self) -> None:
        for batch in _passes(self.loader):
            ids = self.ids(batch)
            sums, counts = self._own(batch, self._similar(batch))
            np.add.at(self.sums, ids[ids >= 0], sums.numpy()[ids >= 0])
            np.add.at(self.counts, ids[ids >= 0], counts.numpy()[ids >= 0])

    def _own(self, batch: Batch, similar: Tensor) -> tuple[Tensor, Tensor]:
        """What each query adds to the sums and counts [B, K] of its pool's examples."""
        real = batch.step_mask & batch.mask[..., None]
        left = _centred(batch.reward - self.slope * _shown(similar, batch), batch.mask)
        flat, where = torch.zeros_like(similar), batch.positions.flatten(1)
        each = torch.where(real, left[..., None].expand(real.shape), 0.0)
        sums = flat.scatter_add(1, where, each.flatten(1))
        return sums, flat.scatter_add(1, where, real.to(flat.dtype).flatten(1))

    def _similar(self, batch: Batch) -> Tensor:
        """Cosines [B, K], float64; at padding anything."""
        query, pool = self.loader.vectors(batch)
        query, units = (functional.normalize(v, dim=-1) for v in (query, pool.vectors))
        return cosine_scores(query, units, pool).double().cpu() * SCORE_TEMPERATURE


def _require_one_length(batch: Batch) -> None:
    lengths = sorted(set(batch.step_mask.sum(-1)[batch.mask].tolist()))
    if len(lengths) > 1 or lengths[0] < 1:
        raise UsageError(
            "the value is that of one number of demonstrations, and the view holds several",
            value=lengths,
            hint="a view of one shot_num, or --shot-num N to see which",
        )


@torch.no_grad()
def _batch(selector: Selector, model: _Model, batch: Batch, request: ValueRequest) -> Floats:
    """Per query [5, B]: SNIPS, direct, doubly robust, mean weight, effective candidates."""
    loader = model.loader
    query, pool = loader.vectors(batch)
    steps = selector.steps(query, pool, batch.positions.to(loader.device), batch.step_mask)
    log_policy = steps.sequence_log_prob().double().cpu()
    log_drawn = _log_behaviour(batch, model.ids(batch), request)
    known = batch.mask & ~log_drawn.isnan()
    if not bool(known.any()):
        raise UsageError(
            "no candidate has a stored log-probability",
            value="/".join(loader.data.provenance["places"]),
            hint="--behaviour uniform, where they were drawn at random or are the whole pool",
        )
    weight = torch.where(known, log_policy - log_drawn, float("-inf"))
    effect = model.effects(batch)
    shown = _shown(effect, batch)
    level = _mean(batch.reward - shown, batch.mask)
    expected = _expected_effect(selector, query, pool, effect, batch, request.seed)
    share = weight.softmax(-1)
    snips = (share * batch.reward).sum(-1)
    robust = expected + (share * (batch.reward - shown)).sum(-1)
    mean_weight = weight.exp().sum(-1) / known.sum(-1)
    sizes = [effective_sample_size(row[row > float("-inf")]) for row in weight.numpy()]
    found = torch.stack([snips, level + expected, robust, mean_weight]).numpy()
    is_told = known.any(-1).numpy()  # a query none of whose candidates counts tells nothing
    return np.vstack([found, sizes])[:, is_told]


def _log_behaviour(batch: Batch, ids: npt.NDArray[np.int64], request: ValueRequest) -> Tensor:
    if request.behaviour == "stored":
        return batch.behaviour.double()
    size = torch.from_numpy((ids >= 0).sum(1)).double()
    length = batch.step_mask.sum(-1).double()
    # one of size · (size - 1) · … ordered pointers
    return -(torch.lgamma(size[:, None] + 1) - torch.lgamma(size[:, None] - length + 1))


def _shown(values: Tensor, batch: Batch) -> Tensor:
    """Mean [B, N] of the pool's values [B, K] over the demonstrations of every candidate."""
    B, N, S = batch.positions.shape
    each = values.gather(1, batch.positions.flatten(1)).view(B, N, S)
    count = batch.step_mask.sum(-1).clamp(min=1)
    return torch.where(batch.step_mask, each, 0.0).sum(-1) / count


def _expected_effect(
    selector: Selector, query: Tensor, pool: Pool, effect: Tensor, batch: Batch, seed: int
) -> Tensor:
    """The effect [B] the selector expects: exact at one demonstration, else of draws."""
    history = selector.begin(query, pool)
    closed = torch.zeros(effect.shape, dtype=torch.bool) if pool.mask is None else ~pool.mask.cpu()
    shots = int(batch.step_mask.sum(-1).max())
    if history.stops:
        raise UsageError(
            "a selector that ends pointers by itself has no value at a fixed number of "
            "demonstrations",
            value=selector.config.selector,
        )
    if shots == 1:
        scores = history.scores()[:, 0].double().cpu().masked_fill(closed, float("-inf"))
        return (scores.softmax(-1) * effect).sum(-1)
    recipe = Recipe(
        shot_num=shots, num_beams=0, temps=(1.0,), num_samples_per_temp=_DRAWS, num_random=0,
        seed=seed,
    )  # fmt: skip
    drawn = samples(history, closed, recipe, batch.query.numpy(), 1.0)
    return effect.gather(1, drawn.flatten(1)).mean(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values - _mean(values, mask)[:, None], 0.0)


def _value(path: Path, figures: Floats, request: ValueRequest) -> Value:
    snips, direct, robust, weight, size = figures
    support = float(weight.mean())
    if support < request.least_support:
        raise LeverError(
            "too little is stored of what this selector would show",
            where=str(path),
            value=f"mean importance weight {support:.2g}, where 1 means all of it",
            hint="generate with this checkpoint, or lower --least-support knowing that",
        )
    return Value(
        str(path),
        bootstrap_mean(snips),
        bootstrap_mean(direct),
        bootstrap_mean(robust),
        support,
        float(size.mean()),
        len(snips),
    )
