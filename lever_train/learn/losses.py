"""Every loss of the trainer: SFT, RCE, GRPO with its advantages and KL estimates.

In go step terms or log-probabilities of B groups of N candidates with their rewards, all padded to
[B, N] with a mask; out come scalars to descend on and figures to log. Formulas are those of
LEGACY.md; what differs is said where it differs. A padded candidate never counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AdvantageKind = Literal["zscore", "center", "loo", "rank"]
KlEstimator = Literal["k1", "k2", "k3"]
KlDirection = Literal["reference_policy", "policy_reference"]

REWARD_STD_FLOOR = 1e-12  # legacy: a group whose std is at most this keeps its raw rewards
SUBSET_STD_FLOOR = 0.1  # legacy: floor of the std when advantages are taken over a subset


def tied_groups(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] bool: all rewards of the group are exactly equal (a group of one is tied)."""
    low = rewards.masked_fill(~mask, float("inf")).amin(-1)
    high = rewards.masked_fill(~mask, float("-inf")).amax(-1)
    return low >= high


def z_score(rewards: Tensor, mask: Tensor, floor: float = REWARD_STD_FLOOR) -> Tensor:
    """(r - mean) / max(std, floor) within each group, unbiased std; 0 for a tied group.

    [B, N] → [B, N], 0 where padded. Legacy leaves the rewards of a tied group unchanged here and
    centres them in a second z-score inside the loss; for untied groups without top-k the second
    changes nothing (mean 0, std 1, floor 0.1), so one is enough, and a tied group is 0 in both.
    """
    centred = center(rewards, mask)
    count = mask.sum(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    scaled = centred / variance.sqrt().clamp(min=floor)
    return scaled.masked_fill(tied_groups(rewards, mask)[:, None], 0.0)


def center(rewards: Tensor, mask: Tensor) -> Tensor:
    """r - mean within each group (Dr. GRPO, arXiv 2503.20783), 0 where padded."""
    kept = rewards.masked_fill(~mask, 0.0)
    mean = kept.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (rewards - mean).masked_fill(~mask, 0.0)


def ranks(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rank of each reward in its group scaled to [0, 1], ties averaged; 0.5 in a group of one.

    The legacy code breaks ties by sort order, which rewards position in the file.
    """
    pair = mask[:, :, None] & mask[:, None, :]
    below = ((rewards[:, :, None] > rewards[:, None, :]) & pair).sum(-1)
    equal = ((rewards[:, :, None] == rewards[:, None, :]) & pair).sum(-1) - 1
    others = mask.sum(-1, keepdim=True) - 1
    rank = (below + 0.5 * equal) / others.clamp(min=1)
    rank = torch.where(others > 0, rank, torch.full_like(rank, 0.5))
    return rank.masked_fill(~mask, 0.0).to(rewards.dtype)


def advantages(
    rewards: Tensor,
    mask: Tensor,
    kind: AdvantageKind = "zscore",
    *,
    floor: float = REWARD_STD_FLOOR,
    clip: float = 5.0,
) -> Tensor:
    """Group advantages [B, N]: ``zscore``, ``center``, ``loo`` (reward minus the mean of the
    others, arXiv 2402.14740) or ``rank`` (ranks scaled to [-1, 1]); clipped to ± ``clip``.

    A tied group, and a group of one, has advantage 0 throughout.
    """
    if kind == "zscore":
        values = z_score(rewards, mask, floor)
    elif kind == "center":
        values = center(rewards, mask)
    elif kind == "loo":
        count = mask.sum(-1, keepdim=True)
        values = center(rewards, mask) * count / (count - 1).clamp(min=1)
    else:
        values = 2.0 * ranks(rewards, mask) - 1.0
    dead = tied_groups(rewards, mask)[:, None] | ~mask
    return values.masked_fill(dead, 0.0).clamp(-clip, clip)


def top_k_mask(rewards: Tensor, mask: Tensor, k: int | None) -> Tensor:
    """[B, N] bool: the ``k`` candidates with the highest reward, ties by the lower ordinal."""
    if k is None or k >= mask.shape[-1]:
        return mask
    order = rewards.masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(mask).scatter(-1, order.indices[:, :k], True)
    return chosen & mask


def rce_weights(rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """softmax(r / τ) within each group, [B, N], 0 where padded."""
    return (rewards / temperature).masked_fill(~mask, float("-inf")).softmax(-1)


def rce_groups(cross_entropy: Tensor, weights: Tensor) -> Tensor:
    """Reward-weighted cross-entropy of each group, [B]: Σ_i w_i Σ_steps CE.

    Args:
        cross_entropy: [B, N, S], 0 where padded.
        weights: [B, N], summing to 1 in each group.
    """
    return (weights.to(cross_entropy.dtype) * cross_entropy.sum(-1)).sum(-1)


def one_candidate_groups(cross_entropy: Tensor, step_mask: Tensor, chosen: Tensor) -> Tensor:
    """Cross-entropy of one candidate of each group, mean over its steps, [B].

    ``chosen`` [B] int64 is its ordinal: 0 is the legacy ``top1_only``; the best beam is SFT.
    """
    rows = torch.arange(len(chosen), device=chosen.device)
    steps = step_mask[rows, chosen].sum(-1).clamp(min=1)
    return cross_entropy[rows, chosen].sum(-1) / steps


def kl_estimate(log_ratio: Tensor, estimator: KlEstimator, direction: KlDirection) -> Tensor:
    """Per-candidate estimate of a KL divergence from log ρ = log π_new - log π_ref.

    ``reference_policy`` is KL(π_ref ‖ π_new), ``policy_reference`` is KL(π_new ‖ π_ref); the
    candidates are taken as draws from the first of the two. k1, k2, k3 as in
    http://joschu.net/blog/kl-approx.html; the legacy term is k3 of ``reference_policy``:
    ρ - 1 - log ρ.
    """
    toward = log_ratio if direction == "reference_policy" else -log_ratio
    if estimator == "k1":
        return -toward
    if estimator == "k2":
        return 0.5 * toward.square()
    return toward.exp() - 1.0 - toward


@dataclass(frozen=True)
class GrpoOptions:
    """What the GRPO loss may do; the defaults are the legacy ones."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # arXiv 1912.09729: bounds the loss where A < 0; above 1
    kl_estimator: KlEstimator = "k3"
    kl_direction: KlDirection = "reference_policy"


@dataclass(frozen=True)
class GrpoGroups:
    """What the GRPO loss reads of B groups, each [B, N].

    ``chosen``: the candidates that count; ``importance``: weights that multiply each candidate's
    PPO term (1 where there is no correction).
    """

    log_prob: Tensor
    reference: Tensor
    advantage: Tensor
    chosen: Tensor
    importance: Tensor


@dataclass(frozen=True)
class GrpoTerms:
    """Parts of the loss and what is logged, [B] each; ``ratio`` [B, N] is detached.

    The loss of a group is ``ppo + β kl``. The clip figures are shares of the chosen candidates.
    """

    ppo: Tensor
    kl: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def grpo_terms(groups: GrpoGroups, options: GrpoOptions) -> GrpoTerms:
    """-mean(min(ρ A, clip(ρ, 1 - low, 1 + high) A)) and the KL, means over a group's candidates.

    ρ = exp(log π_new - log π_ref) of the whole sequence.
    """
    log_ratio = (groups.log_prob - groups.reference).masked_fill(~groups.chosen, 0.0)
    ratio = log_ratio.exp()
    advantage = groups.advantage.to(ratio.dtype)
    bounded = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    if options.dual_clip is not None:
        floor = options.dual_clip * advantage
        gain = torch.where(advantage < 0, torch.maximum(gain, floor), gain)

    def mean(values: Tensor) -> Tensor:
        inside = values.to(ratio.dtype).masked_fill(~groups.chosen, 0.0).sum(-1)
        return inside / groups.chosen.sum(-1).clamp(min=1)

    return GrpoTerms(
        ppo=-mean(gain * groups.importance.to(ratio.dtype)),
        kl=mean(kl_estimate(log_ratio, options.kl_estimator, options.kl_direction)),
        ratio=ratio.detach(),
        clipped_low=mean((ratio < 1.0 - options.clip_low) & (advantage < 0)),
        clipped_high=mean((ratio > 1.0 + options.clip_high) & (advantage > 0)),
    )


def importance_weights(reference: Tensor, behaviour: Tensor, truncate: float) -> Tensor:
    """min(π_ref / π_behaviour, truncate) from stored log-probabilities, [B, N].

    1 where the behaviour log-probability is not known (NaN).
    """
    weight = (reference - behaviour.to(reference.dtype)).exp().clamp(max=truncate)
    return torch.where(torch.isnan(behaviour), torch.ones_like(weight), weight).detach()


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """(Σ w)² / Σ w² per group, [B]; between 1 and the group's size."""
    kept = weights.masked_fill(~mask, 0.0)
    return kept.sum(-1).square() / kept.square().sum(-1).clamp(min=torch.finfo(kept.dtype).tiny)
