"""Selectors asked as tests ask them: with plain vectors for pools, about whole pointers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lever_train.selector.model import Pool, Selector


def pool_of(candidates: Tensor | Pool, mask: Bool[Tensor, "B K"] | None = None) -> Pool:
    """A pool from vectors [K, d], one for all, or [B, K, d]."""
    if isinstance(candidates, Pool):
        return candidates
    if candidates.dim() == 2:
        return Pool(candidates, None, mask)
    B, K, d = candidates.shape
    return Pool(candidates.reshape(B * K, d), torch.arange(B * K).view(B, K), mask)


def first_scores(
    selector: Selector, query: Float[Tensor, "B d"], candidates: Tensor | Pool
) -> Float[Tensor, "B K"]:
    """Scores of the pool at the first step."""
    pool = pool_of(candidates)
    return selector.begin(query, pool).scores()[:, 0, : pool.size]


def sequence_log_prob(
    selector: Selector,
    query: Float[Tensor, "B d"],
    candidates: Tensor | Pool,
    positions: Int[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"] | None = None,
    pool_mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B N"]:
    """Log-probability of each ordered pointer, in nats."""
    if step_mask is None:
        step_mask = torch.ones_like(positions, dtype=torch.bool)
    pool = pool_of(candidates, pool_mask)
    return selector.steps(query, pool, positions, step_mask).sequence_log_prob()
