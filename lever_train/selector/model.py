"""The selector: scores a pool of demonstrations for a query, and is asked step by step for more.

In go query embeddings and a :class:`Pool` of candidate embeddings; out come scores, the
log-probabilities of given pointer sequences, and a :class:`History` that a search extends. Here is
the ``static`` selector of LEGACY.md, whose scores do not depend on what was chosen; ``kinds.py``
has those that remember. State-dict keys are those of the legacy v3 checkpoints.

Single-query attention needs no projected keys or values: W_k is folded into the query and W_v is
applied after the weighted sum, both through the input projection, so attention reads the raw
embeddings once. Only the candidates' own projection is computed, once per distinct example.

Sizes in annotations: B queries, K positions of a pool, U distinct examples, N candidates of a
query, S steps, W partial sequences, d the width of the embeddings, h that of the selector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.options.train import ModelConfig
from lever_train.selector.attention import (
    attention_weights,
    dropout,
    picked_attention,
    picked_scores,
    unit_rows,
)
from lever_train.selector.log_prob import CHOSEN, Steps, static_steps, step_terms, with_stop

SCORE_TEMPERATURE = 0.1  # scores are cosines divided by this
PROJECTION_NOISE = 0.01  # std of what is added to the identity in W_q and W_c


@dataclass(frozen=True)
class Pool:
    """The candidates of B queries.

    ``vectors``: distinct examples, each once. ``index`` into them; ``None``: every query's pool is
    all of ``vectors`` in order, and nothing of size [B, K, d] is ever made. ``mask`` is False where
    a pool is padded; ``None``: nothing is padded. ``features``: of every pair of query and
    candidate, for selectors that read some.
    """

    vectors: Float[Tensor, "U d"]
    index: Int[Tensor, "B K"] | None = None
    mask: Bool[Tensor, "B K"] | None = None
    features: Float[Tensor, "B K F"] | None = None

    @classmethod
    def of(cls, candidates: Tensor | Pool, mask: Bool[Tensor, "B K"] | None = None) -> Pool:
        """A pool from vectors [K, d] or [B, K, d] (or a pool already made)."""
        if isinstance(candidates, Pool):
            return candidates
        if candidates.dim() == 2:
            return cls(candidates, None, mask)
        B, K, d = candidates.shape
        index = torch.arange(B * K, device=candidates.device).view(B, K)
        return cls(candidates.reshape(B * K, d), index, mask)

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

    def spread(self, values: Float[Tensor, "U h"]) -> Tensor:
        """Rows of ``values`` at every pool position: [B, K, h], or [K, h] for a shared pool."""
        return values if self.index is None else functional.embedding(self.index, values)

    def at(self, positions: Int[Tensor, "B N"]) -> Float[Tensor, "B N d"]:
        """The vectors at pool positions."""
        rows = positions if self.index is None else self.index.gather(1, positions)
        return functional.embedding(rows, self.vectors)


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

    def scores(
        self,
        query: Float[Tensor, "B d"],
        candidates: Tensor | Pool,
        pool_mask: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K"]:
        """Scores of the pool at the first step, in natural units of the softmax.

        ``candidates``: [B, K, d], [K, d] (one pool for all) or a :class:`Pool`. Scores of padded
        positions mean nothing; whoever reads them applies the mask.
        """
        pool = Pool.of(candidates, pool_mask)
        return self.begin(query, pool).scores()[:, 0, : pool.size]

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

    def sequence_log_prob(
        self,
        query: Float[Tensor, "B d"],
        candidates: Tensor | Pool,
        positions: Int[Tensor, "B N S"],
        step_mask: Bool[Tensor, "B N S"] | None = None,
        pool_mask: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B N"]:
        """Log-probability of each ordered pointer in nats, in one pass per query."""
        pool = Pool.of(candidates, pool_mask)
        if step_mask is None:
            step_mask = torch.ones_like(positions, dtype=torch.bool)
        return self.steps(query, pool, positions, step_mask).sequence_log_prob()


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
            noise = torch.randn(h, h) * PROJECTION_NOISE
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

    def scores(
        self,
        query: Float[Tensor, "B d"],
        candidates: Tensor | Pool,
        pool_mask: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K"]:
        """Cosines of the projected query and candidates, divided by 0.1."""
        pool = Pool.of(candidates, pool_mask)
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


class FoldedAttention(nn.Module):
    """``nn.MultiheadAttention`` of one query over a pool, with the projections folded.

    q·(W_k c + b_k) = (W_kᵀ q)·c + const, and the softmax does not see the constant, so keys are
    never projected; Σ a (W_v c + b_v) = W_v (Σ a c) + b_v Σ a, so neither are values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden
        self.heads = config.num_heads
        self.dropout = config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * h, h))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * h))
        self.out_proj = nn.Linear(h, h)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "B h"],
        pool: Pool,
        input_weight: Float[Tensor, "h d"] | None,
    ) -> Float[Tensor, "B h"]:
        """Attention of queries over their pools' raw embeddings.

        ``input_weight`` is what the keys would be projected with first; ``None``: identity.
        """
        h, heads = query.shape[-1], self.heads
        w_q, w_k, w_v = self.in_proj_weight.view(3, h, h)
        b_q, _, b_v = self.in_proj_bias.view(3, h)
        split = (query @ w_q.T + b_q).view(-1, heads, h // heads)
        folded = torch.einsum("bne,neh->bnh", split, w_k.view(heads, h // heads, h))
        raw = folded if input_weight is None else folded @ input_weight
        context, share = self._attend(raw / math.sqrt(h // heads), pool)
        if input_weight is not None:
            context = context @ input_weight.T
        values = torch.einsum("bnh,neh->bne", context, w_v.view(heads, h // heads, h))
        values = values + share * b_v.view(heads, h // heads)
        out: Tensor = self.out_proj(values.reshape(-1, h))
        return out

    def _attend(
        self, query: Float[Tensor, "B heads d"], pool: Pool
    ) -> tuple[Float[Tensor, "B heads d"], Float[Tensor, "B heads 1"]]:
        """Context and the sum of its weights, which dropout moves off 1."""
        drop = self.dropout if self.training else 0.0
        query = query.to(pool.vectors.dtype)
        if pool.index is not None:
            return picked_attention(query, pool.vectors, pool.index, pool.mask, drop)
        weights = attention_weights(query @ pool.vectors.T, pool.mask, drop)
        return weights @ pool.vectors, weights.sum(-1, keepdim=True)


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
