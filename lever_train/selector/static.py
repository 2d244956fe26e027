"""The ``static`` selector of LEGACY.md: its scores do not depend on what was chosen.

In go queries and pools; out come scores, and the terms of every step in closed form: one score per
position serves all steps, and no copy of the pool per candidate is made.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lever_train.selector.attention import picked_scores
from lever_train.selector.model import (
    CHOSEN,
    SCORE_TEMPERATURE,
    AttentionSelector,
    History,
    Pool,
    Steps,
)


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
