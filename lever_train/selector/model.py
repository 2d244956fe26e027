"""The selector: scores a pool of demonstrations for a query, and is asked step by step for more.

In go query embeddings and a :class:`Pool` of candidate embeddings; out come scores, the
log-probabilities of given pointer sequences, and a :class:`History` that a search extends. Here is
the ``static`` selector of LEGACY.md, whose scores do not depend on what was chosen; ``kinds.py``
has those that remember. State-dict keys are those of the legacy v3 checkpoints.

Sizes in annotations: B queries, K positions of a pool, U distinct examples, N candidates of a
query, S steps, W partial sequences, d the width of the embeddings, h that of the selector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.selector.attention import FoldedAttention, dropout, picked_scores, unit_rows

if TYPE_CHECKING:
    from lever_train.options.train import ModelConfig

SCORE_TEMPERATURE = 0.1  # scores are cosines divided by this
PROJECTION_NOISE = 0.01  # std of what is added to the identity in W_q and W_c
RARE = 3.0  # scores that say how right a candidate is are log-odds and this: 0 is one in twenty
CHOSEN = -100.0  # logit of a position already chosen (LEGACY mathematics)


@dataclass(frozen=True)
class Pool:
    """The candidates of B queries.

    ``vectors``: distinct examples, each once. ``index`` into them; ``None``: every query's pool is
    all of ``vectors`` in order, and nothing of size [B, K, d] is ever made. ``mask`` is False where
    a pool is padded; ``None``: nothing is padded. ``features``: of every pair of query and
    candidate, for selectors that read some; behind the F there are K more for one that reads votes,
    what each place of the pool gives to the candidate's answer. ``length`` of every vector, and
    its ``units``, what :meth:`AttentionSelector.units` makes of it, where they are known.
    """

    vectors: Float[Tensor, "U d"]
    index: Int[Tensor, "B K"] | None = None
    mask: Bool[Tensor, "B K"] | None = None
    features: Float[Tensor, "B K F"] | None = None
    length: Float[Tensor, " U"] | None = None
    units: Float[Tensor, "U h"] | None = None

    @classmethod
    def distinct(cls, table: Float[Tensor, "n d"], ids: Int[Tensor, "B K"]) -> Pool:
        """A pool of rows of ``table``; ``ids`` are -1 where padded.

        Rows that several pools share are gathered, and later projected, once.
        """
        real = ids >= 0
        used = torch.zeros(table.shape[0], dtype=torch.bool, device=ids.device)
        used[ids[real]] = True
        place = used.cumsum(0) - 1
        index = place[ids.clamp(min=0)].masked_fill(~real, 0)
        rows = used.nonzero().squeeze(1)
        vectors = table.index_select(0, rows.to(table.device))
        return cls(vectors, index, None if bool(real.all()) else real)

    @property
    def size(self) -> int:
        """K, the padded size of the pools."""
        return self.vectors.shape[0] if self.index is None else self.index.shape[1]

    @property
    def lengths(self) -> Float[Tensor, " U"]:
        """The length of every vector, never 0."""
        return vector_lengths(self.vectors) if self.length is None else self.length

    def spread(self, values: Float[Tensor, "U h"]) -> Tensor:
        """Rows of ``values`` at every pool position: [B, K, h], or [K, h] for a shared pool."""
        return values if self.index is None else functional.embedding(self.index, values)

    def at(self, positions: Int[Tensor, "B N"]) -> Float[Tensor, "B N d"]:
        """The vectors at pool positions."""
        rows = positions if self.index is None else self.index.gather(1, positions)
        return functional.embedding(rows, self.vectors)


def vector_lengths(vectors: Float[Tensor, "U d"]) -> Float[Tensor, " U"]:
    """What vectors are divided by to be of length 1; of zeros 1e-12."""
    length: Tensor = vectors.norm(dim=-1).clamp(min=1e-12)
    return length


@dataclass(frozen=True)
class Steps:
    """What every loss needs of every step of every candidate, zero where padded.

    ``log_prob``: log-probability of the position chosen, in nats, at most 0.
    ``mean_nll``: mean over the K positions of the pool of -log p, chosen positions counted with
    the logit -100; the part of the cross-entropy that label smoothing weighs.
    ``mask``: the steps that count; a selector that can stop has one more than the pointer is long.
    """

    log_prob: Float[Tensor, "B N S"]
    mean_nll: Float[Tensor, "B N S"]
    mask: Bool[Tensor, "B N S"]

    def cross_entropy(self, label_smoothing: float) -> Float[Tensor, "B N S"]:
        """Cross-entropy per step as ``torch.nn.functional.cross_entropy`` defines it."""
        return -(1.0 - label_smoothing) * self.log_prob + label_smoothing * self.mean_nll

    def sequence_log_prob(self) -> Float[Tensor, "B N"]:
        """Log-probability of each candidate's ordered pointer, in nats."""
        return self.log_prob.sum(-1)


class History(ABC):
    """Partial sequences being extended: W of them for each of B queries.

    ``stops``: the scores have one more column, the last: to end the sequence here.
    """

    stops = False

    @abstractmethod
    def scores(self) -> Float[Tensor, "B W K"]:
        """Scores of the next step; chosen positions are the caller's to mask."""

    @abstractmethod
    def advance(self, parent: Int[Tensor, "B V"], chosen: Int[Tensor, "B V"]) -> History:
        """Extend sequence ``parent`` of each query by pool position ``chosen``: V sequences."""


class Selector(nn.Module):
    """Anything that picks demonstrations step by step.

    ``dim``: width d of the embeddings; ``num_features``: F, the features it reads of every pair.
    A kind says how it begins; scores and log-probabilities follow step by step, at the price of a
    dense [B, N, K] softmax per step, where it knows no shorter way.
    """

    def __init__(self, dim: int, config: ModelConfig, num_features: int = 0) -> None:
        super().__init__()
        self.dim, self.config, self.num_features = dim, config, num_features

    def begin(self, query: Float[Tensor, "B d"], pool: Pool) -> History:
        """Start choosing: nothing chosen yet, one partial sequence per query."""
        raise NotImplementedError

    def steps(
        self,
        query: Float[Tensor, "B d"],
        pool: Pool,
        positions: Int[Tensor, "B N S"],
        step_mask: Bool[Tensor, "B N S"],
    ) -> Steps:
        """Terms of every step of the candidates at pool ``positions``, teacher-forced."""
        history, real = self.begin(query, pool), pool.mask
        if history.stops:
            limit = self.config.max_shots
            if positions.shape[-1] > limit:
                raise LeverError(
                    f"this {self.config.selector} selector shows at most {limit} demonstrations",
                    value=positions.shape[-1],
                    hint="train one with a larger --max-shots",
                )
            positions, step_mask = with_stop(positions, step_mask, pool.size, limit)
            real = None if real is None else functional.pad(real, (0, 1), value=True)
        B, N, S = positions.shape
        chosen = torch.zeros(B, N, pool.size + history.stops, dtype=torch.bool, device=query.device)
        parent = torch.zeros(B, N, dtype=torch.long, device=query.device)
        terms: list[tuple[Tensor, Tensor]] = []
        for t in range(S):
            logits = history.scores().float()
            if t > 0:  # before the first choice the N candidates share one softmax
                logits = logits.expand(-1, N, -1).masked_fill(chosen, CHOSEN)
            terms.append(step_terms(logits, positions[:, :, t], real))
            if t + 1 < S:
                chosen = chosen.scatter(2, positions[:, :, t : t + 1], True)
                history = history.advance(parent, positions[:, :, t])
                parent = torch.arange(N, device=query.device).expand(B, N)
        log_prob, mean_nll = (torch.stack(part, dim=-1) for part in zip(*terms, strict=True))
        return Steps(
            torch.where(step_mask, log_prob, 0.0), torch.where(step_mask, mean_nll, 0.0), step_mask
        )


def step_terms(
    logits: Float[Tensor, "B W K"],
    target: Int[Tensor, "B N"],
    pool_mask: Bool[Tensor, "B K"] | None,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Of one step: the log-probability of ``target`` and the mean -log p of the pool.

    W is N, or 1 where all candidates share the logits.
    """
    if pool_mask is None:
        log_p = functional.log_softmax(logits, dim=-1)
        mean_nll = -log_p.mean(-1)
    else:
        real = pool_mask[:, None, :]
        log_p = functional.log_softmax(logits.masked_fill(~real, float("-inf")), dim=-1)
        mean_nll = -log_p.masked_fill(~real, 0.0).sum(-1) / real.sum(-1)
    each = log_p.expand(-1, target.shape[1], -1)
    return each.gather(2, target[..., None]).squeeze(2), mean_nll.expand_as(target)


def with_stop(
    positions: Int[Tensor, "B N S"], step_mask: Bool[Tensor, "B N S"], stop: int, limit: int
) -> tuple[Int[Tensor, "B N T"], Bool[Tensor, "B N T"]]:
    """A step more that stops, at position ``stop``, for every pointer shorter than ``limit``."""
    length = step_mask.sum(-1, keepdim=True)
    if positions.shape[-1] < limit:
        positions, step_mask = functional.pad(positions, (0, 1)), functional.pad(step_mask, (0, 1))
    at = torch.arange(positions.shape[-1], device=positions.device)
    return positions.masked_fill(at >= length, stop), at <= length


def drawn(*size: int, std: float = 1.0) -> Tensor:
    """Normal numbers of mean 0 on the default device.

    None where only shapes count: torch would import its compiler to draw none, 1.4 s of every
    program that reads a checkpoint.
    """
    empty = torch.empty(size)
    return empty if empty.is_meta else empty.normal_(std=std)


class AttentionSelector(Selector):
    """The parts that the legacy selectors share: attention, projections, unit vectors."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__(dim, config)
        h = config.hidden
        self.input_proj = nn.Identity() if dim == h else nn.Linear(dim, h, bias=False)
        self.cross_attn_layers = nn.ModuleList(
            FoldedAttention(config) for _ in range(config.num_layers)
        )
        self.attn_norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(config.num_layers))
        self.query_proj = nn.Linear(h, h, bias=False)
        self.cand_proj = nn.Linear(h, h, bias=False)
        if isinstance(self.input_proj, nn.Linear):
            nn.init.xavier_uniform_(self.input_proj.weight)
        for projection in (self.query_proj, self.cand_proj):
            noise = drawn(h, h, std=PROJECTION_NOISE)
            if not noise.is_meta:
                projection.weight.data.copy_(torch.eye(h) + noise)

    def attend(self, query: Float[Tensor, "B d"], pool: Pool) -> Float[Tensor, "B h"]:
        """The query after the attention layers."""
        weight = self._input_weight()
        state: Tensor = query if weight is None else query @ weight.T
        for attention, norm in zip(self.cross_attn_layers, self.attn_norms, strict=True):
            state = norm(attention(state, pool, weight) + state)
        return state

    def head(self, state: Float[Tensor, "*B h"]) -> Float[Tensor, "*B h"]:
        """The unit vector that candidates are compared with."""
        projected = dropout(self.query_proj(state), self.config.dropout, self.training)
        return functional.normalize(projected, dim=-1)

    def units(self, pool: Pool) -> Float[Tensor, "U h"]:
        """Unit vectors of the distinct candidates.

        Dropout is drawn once per distinct example and batch; the legacy code draws it for every
        copy of the pool. Each query sees noise of the same distribution.
        """
        if pool.units is not None:
            return pool.units
        outer, inner = self.cand_proj.weight, self._input_weight()
        if pool.vectors.shape[0] > self.dim:  # the product of weights costs h·h·d once
            weight = outer if inner is None else outer @ inner
            drop = self.config.dropout if self.training else 0.0
            return unit_rows(pool.vectors, weight.to(pool.vectors.dtype), drop)
        inward = pool.vectors if inner is None else pool.vectors @ inner.T
        noisy = dropout(inward @ outer.T, self.config.dropout, self.training)
        return functional.normalize(noisy, dim=-1)

    def _input_weight(self) -> Float[Tensor, "h d"] | None:
        return self.input_proj.weight if isinstance(self.input_proj, nn.Linear) else None


class StaticSelector(AttentionSelector):
    """The selector of LEGACY.md: its scores do not depend on what was chosen."""

    def scores(self, query: Float[Tensor, "B d"], pool: Pool) -> Float[Tensor, "B K"]:
        """Cosines of the projected query and candidates, divided by 0.1; at padding anything."""
        return cosine_scores(self.head(self.attend(query, pool)), self.units(pool), pool)

    def steps(
        self,
        query: Float[Tensor, "B d"],
        pool: Pool,
        positions: Int[Tensor, "B N S"],
        step_mask: Bool[Tensor, "B N S"],
    ) -> Steps:
        """Terms of every step in closed form; see :meth:`Selector.steps`."""
        scores = self.scores(query, pool)
        return static_steps(scores.float(), positions, step_mask, pool.mask)

    def begin(self, query: Float[Tensor, "B d"], pool: Pool) -> History:
        """Start choosing; see :meth:`Selector.begin`."""
        return StaticHistory(self.scores(query, pool)[:, None, :])


def cosine_scores(
    query: Float[Tensor, "B h"], units: Float[Tensor, "U h"], pool: Pool
) -> Float[Tensor, "B K"]:
    """Cosines of unit queries with the pool's unit vectors, divided by 0.1."""
    if torch.bfloat16 in (query.dtype, units.dtype):  # autocast: products only, not the scores
        query, units = query.float(), units.float()
    if pool.index is None:
        return query @ units.T / SCORE_TEMPERATURE
    return picked_scores(query, units, pool.index) / SCORE_TEMPERATURE


class StaticHistory(History):
    """Nothing to remember: the scores [B, 1, K] stay what they are."""

    def __init__(self, scores: Float[Tensor, "B 1 K"]) -> None:
        self._scores = scores

    def scores(self) -> Float[Tensor, "B 1 K"]:
        """See the base class; broadcasts over W."""
        return self._scores

    def advance(self, parent: Int[Tensor, "B V"], chosen: Int[Tensor, "B V"]) -> History:
        """The same scores for every sequence."""
        return self


def static_steps(
    scores: Float[Tensor, "B K"],
    positions: Int[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"],
    pool_mask: Bool[Tensor, "B K"] | None = None,
) -> Steps:
    """Terms of every step for scores that do not depend on the step: one score per pool position
    serves all steps, and no copy of the pool per candidate is made.

    Args:
        scores: finite; natural units of the softmax (cosine / 0.1).
        positions: distinct within a candidate's real steps.
        step_mask: real steps come first.
        pool_mask: False at padding; ``None``: every position is real.

    The step distribution is the softmax over positions not yet chosen. The legacy code leaves
    chosen positions in with logit -100, which adds less than e^-80 of the sum; only the smoothing
    term sees them.
    """
    normaliser = _log_remaining(scores, positions, step_mask, pool_mask)
    target = _at(scores, positions)
    log_prob = torch.where(step_mask, target - normaliser, 0.0)
    if pool_mask is None:
        total, size = scores.sum(-1), scores.new_full((scores.shape[0],), scores.shape[1])
    else:
        total = torch.where(pool_mask, scores, 0.0).sum(-1)
        size = pool_mask.sum(-1).to(scores.dtype)
    chosen = torch.where(step_mask, target, 0.0)
    before = chosen.cumsum(-1) - chosen
    count = torch.arange(positions.shape[-1], device=scores.device)
    masked_sum = total[:, None, None] - before + CHOSEN * count
    mean_nll = torch.where(step_mask, normaliser - masked_sum / size[:, None, None], 0.0)
    return Steps(log_prob, mean_nll, step_mask)


def _log_remaining(
    scores: Float[Tensor, "B K"],
    positions: Int[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"],
    pool_mask: Bool[Tensor, "B K"] | None,
) -> Float[Tensor, "B N S"]:
    """log of the sum of exp(score) over what is unchosen before each step.

    The sum over the pool less what was already chosen, arranged so that it can neither cancel nor
    underflow: the S largest scores of a pool are kept apart from the rest. A prefix holds at most
    S - 1 positions, so one of the S largest is always unchosen: it bounds what is subtracted and
    is what exponents are taken relative to. The relative error is a few roundings, in float32 as
    well, whatever the range of the scores.
    """
    if pool_mask is not None:
        scores = scores.masked_fill(~pool_mask, float("-inf"))
    top, top_at = scores.topk(min(positions.shape[-1], scores.shape[-1]), dim=-1)
    others = scores.scatter(1, top_at, float("-inf"))
    base = others.detach().amax(-1, keepdim=True)
    base = torch.where(base.isfinite(), base, 0.0)  # a pool all of which is on top
    mass = (others - base).exp()
    is_top = (positions[..., None] == top_at[:, None, None, :]) & step_mask[..., None]
    outside = torch.where(step_mask, _at(mass, positions), 0.0)  # 0 for the top
    rest = mass.sum(-1)[:, None, None] - (outside.cumsum(-1) - outside)
    taken = (is_top.int().cumsum(-2) - is_top.int()) > 0
    open_top = top[:, None, None, :].masked_fill(taken, float("-inf"))
    highest = open_top.detach().amax(-1)
    # a padded step may find the pool exhausted: 0 and 1 keep its gradient out of the sum
    highest = torch.where(highest.isfinite(), highest, 0.0)
    shifted = (open_top - highest[..., None]).exp().sum(-1)
    remaining = shifted + rest * (base[..., None] - highest).clamp(max=0.0).exp()
    return torch.where(step_mask, remaining, 1.0).log() + highest


def _at(values: Float[Tensor, "B K"], positions: Int[Tensor, "B N S"]) -> Float[Tensor, "B N S"]:
    """``values`` at ``positions``."""
    return values.gather(1, positions.flatten(1)).view(positions.shape)
