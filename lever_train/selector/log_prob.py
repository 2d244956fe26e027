"""Log-probabilities of pointer sequences: in closed form where scores do not change, else by step.

In go scores and the positions [B, N, S] of N candidates; out come the terms of every step. Where
one score per pool position [B, K] serves all steps, no copy of the pool per candidate is made: the
normaliser of step t is the sum over the pool minus what was already chosen.

That subtraction is arranged so that it can neither cancel nor underflow: the S largest scores of a
pool are kept apart from the rest. A prefix holds at most S - 1 positions, so one of the S largest
is always unchosen: it bounds what is subtracted and is what exponents are taken relative to. The
relative error is a few roundings, in float32 as well, whatever the range of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CHOSEN = -100.0  # logit of a position already chosen (LEGACY mathematics)


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


def static_steps(
    scores: Float[Tensor, "B K"],
    positions: Int[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"],
    pool_mask: Bool[Tensor, "B K"] | None = None,
) -> Steps:
    """Terms of every step for scores that do not depend on the step.

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
    total, size = _total(scores, pool_mask)
    chosen = torch.where(step_mask, target, 0.0)
    before = chosen.cumsum(-1) - chosen
    count = torch.arange(positions.shape[-1], device=scores.device)
    masked_sum = total[:, None, None] - before + CHOSEN * count
    mean_nll = torch.where(step_mask, normaliser - masked_sum / size[:, None, None], 0.0)
    return Steps(log_prob, mean_nll, step_mask)


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


def _total(
    scores: Float[Tensor, "B K"], pool_mask: Bool[Tensor, "B K"] | None
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Sum of a pool's scores and its size."""
    if pool_mask is None:
        return scores.sum(-1), scores.new_full((scores.shape[0],), scores.shape[1])
    return torch.where(pool_mask, scores, 0.0).sum(-1), pool_mask.sum(-1).to(scores.dtype)


def _log_remaining(
    scores: Float[Tensor, "B K"],
    positions: Int[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"],
    pool_mask: Bool[Tensor, "B K"] | None,
) -> Float[Tensor, "B N S"]:
    """log of the sum of exp(score) over what is unchosen before each step."""
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
