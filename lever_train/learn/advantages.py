"""What becomes of a group's rewards before a loss reads them: advantages, ranks, weights of groups.

In go rewards of B groups of at most N candidates, padded with a mask; out come numbers of the same
shape, or one per group. Formulas are those of LEGACY.md; what differs is said where it differs. A
padded candidate never counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lever_train.learn.batch import Batch
from lever_train.options.train import TrainConfig

REWARD_STD_FLOOR = 1e-12  # legacy: a group whose std is at most this keeps its raw rewards
SUBSET_STD_FLOOR = 0.1  # legacy: floor of the std when advantages are taken over a subset

PerGroup = Float[Tensor, " B"]
PerCandidate = Float[Tensor, "B N"]
Candidates = Bool[Tensor, "B N"]


def grpo_advantages(batch: Batch, chosen: Candidates, config: TrainConfig) -> PerCandidate:
    """Advantages, 0 outside ``chosen``.

    ``full``: over the whole group. ``subset``, the legacy way: z-scored rewards of the whole
    group, then once more over the chosen with a floor of 0.1 under the std.
    """
    options, clamp = config.grpo, config.run.normalize_clamp
    if options.topk_baseline == "subset":
        scored = z_score(batch.reward, batch.mask, clamp=clamp)
        return advantages(
            scored, chosen, options.advantage, floor=SUBSET_STD_FLOOR, clip=options.advantage_clip
        )
    bound = options.advantage_clip
    if options.advantage == "zscore" and clamp is not None:
        bound = min(bound, clamp)
    full = advantages(batch.reward, batch.mask, options.advantage, clip=bound)
    return full.masked_fill(~chosen, 0.0)


def group_weights(batch: Batch, stage: str, config: TrainConfig) -> PerGroup:
    """Weight of each group in the loss: what becomes of tied groups.

    RCE: as ``tied_groups`` says. GRPO: a tied group has no advantage, and keeps its KL gradient
    only with ``tied_kl`` (or ``tied_groups = keep``, the legacy behaviour). Dense: it is left
    out. SFT: ties do not matter, the best candidate is what it is.
    """
    weight = torch.ones(len(batch), dtype=torch.float32)
    policy = config.run.tied_groups
    if stage == "dense":
        policy = "skip"
    if stage == "sft" or policy == "keep" or (stage == "grpo" and config.grpo.tied_kl):
        return weight
    share = config.run.tied_weight if policy == "downweight" and stage == "rce" else 0.0
    return weight.masked_fill(tied_groups(batch.reward, batch.mask), share)


def tied_groups(rewards: PerCandidate, mask: Candidates) -> Bool[Tensor, " B"]:
    """All rewards of the group are exactly equal (a group of one is tied)."""
    low = rewards.masked_fill(~mask, float("inf")).amin(-1)
    high = rewards.masked_fill(~mask, float("-inf")).amax(-1)
    return low >= high


def z_score(
    rewards: PerCandidate,
    mask: Candidates,
    floor: float = REWARD_STD_FLOOR,
    clamp: float | None = None,
) -> PerCandidate:
    """(r - mean) / max(std, floor) within each group, unbiased std; 0 for a tied group and where
    padded; with ``clamp`` not beyond ± that, as the newest legacy code has it.

    Legacy leaves the rewards of a tied group unchanged here and
    centres them in a second z-score inside the loss; for untied groups without top-k the second
    changes nothing (mean 0, std 1, floor 0.1), so one is enough, and a tied group is 0 in both.
    """
    centred = center(rewards, mask)
    count = mask.sum(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    scaled = centred / variance.sqrt().clamp(min=floor)
    if clamp is not None:
        scaled = scaled.clamp(-clamp, clamp)
    return scaled.masked_fill(tied_groups(rewards, mask)[:, None], 0.0)


def center(rewards: PerCandidate, mask: Candidates) -> PerCandidate:
    """r - mean within each group (Dr. GRPO, arXiv 2503.20783), 0 where padded."""
    kept = rewards.masked_fill(~mask, 0.0)
    mean = kept.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (rewards - mean).masked_fill(~mask, 0.0)


def ranks(rewards: PerCandidate, mask: Candidates) -> PerCandidate:
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
    rewards: PerCandidate,
    mask: Candidates,
    kind: str = "zscore",
    *,
    floor: float = REWARD_STD_FLOOR,
    clip: float = 5.0,
) -> PerCandidate:
    """Group advantages: ``zscore``, ``center``, ``loo`` (reward minus the mean of the
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


def top_k_mask(rewards: PerCandidate, mask: Candidates, k: int | None) -> Candidates:
    """The ``k`` candidates with the highest reward, ties by the lower ordinal."""
    if k is None or k >= mask.shape[-1]:
        return mask
    order = rewards.masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(mask).scatter(-1, order.indices[:, :k], True)
    return chosen & mask
