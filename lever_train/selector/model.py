"""The selector: scores a pool of demonstrations for a query and picks an ordered few of them.

In go query embeddings [B, d] and a pool of candidate embeddings; out come scores [B, K], the
log-probabilities of given pointer sequences, and (through ``decode.py``) greedy, beam and sampled
picks. Two kinds behind one interface: ``static`` (LEGACY.md: scores do not depend on what was
chosen) and ``gru`` (``history.py``). State-dict keys are those of the legacy v3 checkpoints.

Single-query attention needs no projected keys or values: W_k is folded into the query and W_v is
applied after the weighted sum, both through the input projection, so attention reads the raw
embeddings once. Only the candidates' own projection is computed, once per distinct example.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from lever_train.options.train import MAX_HIDDEN, MAX_LAYERS, MAX_SHOTS
from lever_train.selector.attention import (
    attention_weights,
    dropout,
    picked_attention,
    picked_scores,
    unit_rows,
)
from lever_train.selector.closed_form import Steps, static_steps
from lever_train.selector.pool import Pool

SCORE_TEMPERATURE = 0.1  # scores are cosines divided by this
MAX_DIM = 1 << 20
PROJECTION_NOISE = 0.01  # std of what is added to the identity in W_q and W_c


class SelectorConfig(BaseModel):
    """The shape of a selector; all of it is in a checkpoint of ours, and `dim`, `hidden`,
    `layers` and `kind` can be read off the tensors of a legacy one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["static", "gru"] = "static"
    dim: int = Field(ge=1, le=MAX_DIM)  # d of the embeddings
    hidden: int = Field(default=256, ge=1, le=MAX_HIDDEN)
    layers: int = Field(default=1, ge=0, le=MAX_LAYERS)
    heads: int = Field(default=1, ge=1, le=MAX_HIDDEN)
    max_shots: int = Field(default=4, ge=1, le=MAX_SHOTS)  # gru: rows of the step embedding
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden {self.hidden}")
        return self


class Selector(nn.Module):
    """The static selector of LEGACY.md, and the base of those that remember what they chose."""

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        self.config = config
        d, h = config.dim, config.hidden
        self.input_proj = nn.Identity() if d == h else nn.Linear(d, h, bias=False)
        self.cross_attn_layers = nn.ModuleList(
            FoldedAttention(config) for _ in range(config.layers)
        )
        self.attn_norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(config.layers))
        self.query_proj = nn.Linear(h, h, bias=False)
        self.cand_proj = nn.Linear(h, h, bias=False)
        if isinstance(self.input_proj, nn.Linear):
            nn.init.xavier_uniform_(self.input_proj.weight)
        for projection in (self.query_proj, self.cand_proj):
            noise = torch.randn(h, h) * PROJECTION_NOISE
            projection.weight.data.copy_(torch.eye(h) + noise)

    def scores(
        self, query: Tensor, candidates: Tensor | Pool, pool_mask: Tensor | None = None
    ) -> Tensor:
        """Scores of the first step.

        Args:
            query: [B, d] float.
            candidates: [B, K, d], [K, d] (one pool for all) or a :class:`Pool`.
            pool_mask: [B, K] bool, False at padding.

        Returns:
            [B, K] float: cosine of the projected query and candidate, divided by 0.1. Scores of
            padded positions mean nothing; whoever reads them applies the mask.
        """
        pool = Pool.of(candidates, pool_mask)
        return cosine_scores(self.head(self.attend(query, pool)), self.units(pool), pool)

    def steps(self, query: Tensor, pool: Pool, positions: Tensor, step_mask: Tensor) -> Steps:
        """Terms of every step of the candidates at ``positions`` [B, N, S], teacher-forced."""
        scores = self.scores(query, pool)
        return static_steps(scores.float(), positions, step_mask, pool.mask)

    def sequence_log_prob(
        self,
        query: Tensor,
        candidates: Tensor | Pool,
        positions: Tensor,
        step_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each ordered pointer, [B, N] nats, in one pass per query."""
        pool = Pool.of(candidates, pool_mask)
        if step_mask is None:
            step_mask = torch.ones_like(positions, dtype=torch.bool)
        return self.steps(query, pool, positions, step_mask).sequence_log_prob()

    def begin(self, query: Tensor, pool: Pool) -> History:
        """Start choosing: nothing chosen yet, one partial sequence a query."""
        return StaticHistory(self.scores(query, pool)[:, None, :])

    def attend(self, query: Tensor, pool: Pool) -> Tensor:
        """The query after the attention layers, [B, h]."""
        weight = self._input_weight()
        state: Tensor = query if weight is None else query @ weight.T
        if self.config.layers == 0:
            return state
        for attention, norm in zip(self.cross_attn_layers, self.attn_norms, strict=True):
            state = norm(attention(state, pool, weight) + state)
        return state

    def head(self, state: Tensor) -> Tensor:
        """The unit vector [..., h] that candidates are compared with."""
        projected = dropout(self.query_proj(state), self.config.dropout, self.training)
        return functional.normalize(projected, dim=-1)

    def units(self, pool: Pool) -> Tensor:
        """Unit vectors of the distinct candidates, [U, h].

        Dropout is drawn once per distinct example and batch; the legacy code draws it for every
        copy of the pool. Each query sees noise of the same distribution.
        """
        outer, inner = self.cand_proj.weight, self._input_weight()
        if pool.vectors.shape[0] > self.config.dim:  # the product of weights costs h·h·d once
            weight = outer if inner is None else outer @ inner
            drop = self.config.dropout if self.training else 0.0
            return unit_rows(pool.vectors, weight.to(pool.vectors.dtype), drop)
        inward = pool.vectors if inner is None else pool.vectors @ inner.T
        noisy = dropout(inward @ outer.T, self.config.dropout, self.training)
        return functional.normalize(noisy, dim=-1)

    def _input_weight(self) -> Tensor | None:
        return self.input_proj.weight if isinstance(self.input_proj, nn.Linear) else None


class FoldedAttention(nn.Module):
    """``nn.MultiheadAttention`` of one query over a pool, with the projections folded.

    q·(W_k c + b_k) = (W_kᵀ q)·c + const, and the softmax does not see the constant, so keys are
    never projected; Σ a (W_v c + b_v) = W_v (Σ a c) + b_v Σ a, so neither are values.
    """

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        h = config.hidden
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * h, h))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * h))
        self.out_proj = nn.Linear(h, h)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, pool: Pool, input_weight: Tensor | None) -> Tensor:
        """Attention output [B, h] of queries [B, h] over their pools' raw embeddings.

        ``input_weight`` [h, d] is what the keys would be projected with first; ``None``: identity.
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

    def _attend(self, query: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """Context [B, heads, d] and the sum of its weights [B, heads, 1]."""
        drop = self.dropout if self.training else 0.0
        query = query.to(pool.vectors.dtype)
        if pool.index is not None:
            return picked_attention(query, pool.vectors, pool.index, pool.mask, drop)
        weights = attention_weights(query @ pool.vectors.T, pool.mask, drop)
        return weights @ pool.vectors, weights.sum(-1, keepdim=True)


def cosine_scores(query: Tensor, units: Tensor, pool: Pool) -> Tensor:
    """Scores of unit queries [B, h] or [B, N, h] against a pool's units [U, h]: [B, (N,) K]."""
    if torch.bfloat16 in (query.dtype, units.dtype):  # autocast: products only, not the scores
        query, units = query.float(), units.float()
    if pool.index is None:
        return query @ units.T / SCORE_TEMPERATURE
    if query.dim() == 3:
        return query @ pool.gathered(units).transpose(-1, -2) / SCORE_TEMPERATURE
    return picked_scores(query, units, pool.index) / SCORE_TEMPERATURE


class History(ABC):
    """Partial sequences being extended: W of them for each of B queries."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Scores of the next step, [B, W, K]; chosen positions are the caller's to mask."""

    @abstractmethod
    def advance(self, parent: Tensor, chosen: Tensor) -> History:
        """Extend sequence ``parent`` [B, W'] of each query by pool position ``chosen`` [B, W']."""


class StaticHistory(History):
    """Nothing to remember: the scores [B, 1, K] stay what they are."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def scores(self) -> Tensor:
        """See the base class; broadcasts over W."""
        return self._scores

    def advance(self, parent: Tensor, chosen: Tensor) -> History:
        """The same scores for every sequence."""
        return self
