"""What a step descends on: one small function a stage, from a feed to a loss per group.

In go the selector, a :class:`Feed` and the step's settings; out comes an :class:`Objective`: the
loss and the weight of every group, and figures to log. The loop knows nothing else of the stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lever_train.learn import losses
from lever_train.learn.batch import Batch
from lever_train.learn.loader import Feed
from lever_train.options.train import TrainConfig
from lever_train.selector.log_prob import Steps
from lever_train.selector.model import Selector


@dataclass(frozen=True)
class Settings:
    """What changes from step to step.

    ``temperature``: τ of RCE; ``beta``: weight of the KL; ``top_k``: candidates that train, all
    where ``None``, chosen by ``pick``; ``reference``: the policy π_old of GRPO, in eval mode;
    ``lr_factor`` multiplies the learning rate.
    """

    temperature: float = 1.0
    beta: float = 0.0
    top_k: int | None = None
    pick: Callable[[Tensor, Tensor, int | None], Tensor] = losses.top_k_mask
    reference: Selector | None = None
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Objective:
    """Loss ``per_group`` [B] to average with ``weight`` [B]; ``figures``, [B] each, detached."""

    per_group: Tensor
    weight: Tensor
    figures: dict[str, Tensor]


Stage = Callable[[Selector, Feed, Tensor, Settings, TrainConfig], Objective]


def sft(
    selector: Selector, feed: Feed, weight: Tensor, settings: Settings, config: TrainConfig
) -> Objective:
    """Cross-entropy of the best candidate (highest InfoScore, ties by ordinal), mean over steps."""
    batch = feed.batch
    best = losses.top_k_mask(batch.reward, batch.mask, 1).int().argmax(-1)
    steps = _steps(selector, feed)
    cross_entropy = steps.cross_entropy(config.model.label_smoothing)
    per_group = losses.one_candidate_groups(cross_entropy, steps.mask, best)
    return Objective(per_group, weight, {})


def rce(
    selector: Selector, feed: Feed, weight: Tensor, settings: Settings, config: TrainConfig
) -> Objective:
    """Reward-weighted cross-entropy at temperature τ, in the variant the config names."""
    batch, options = feed.batch, config.rce
    steps = _steps(selector, feed)
    cross_entropy = steps.cross_entropy(config.model.label_smoothing)
    if options.top1_only:
        first = torch.zeros_like(batch.query)
        return Objective(losses.one_candidate_groups(cross_entropy, steps.mask, first), weight, {})
    worth = batch.reward
    if options.rank:
        worth = losses.ranks(worth, batch.mask)
    elif options.use_normalized_reward:
        worth = losses.z_score(worth, batch.mask)
    weights = losses.rce_weights(worth, batch.mask, settings.temperature)
    expected = (weights * batch.reward).sum(-1)
    return Objective(
        losses.rce_groups(cross_entropy, weights), weight, {"weighted_reward": expected}
    )


def grpo(
    selector: Selector, feed: Feed, weight: Tensor, settings: Settings, config: TrainConfig
) -> Objective:
    """Clipped policy gradient on group advantages plus β KL to the reference policy."""
    batch, options = feed.batch, config.grpo
    assert settings.reference is not None
    with torch.no_grad():
        reference = _steps(settings.reference, feed).sequence_log_prob()
    chosen = settings.pick(batch.reward, batch.mask, settings.top_k)
    advantage = grpo_advantages(batch, chosen, config)
    importance = torch.ones_like(reference)
    if options.importance_cap is not None:
        importance = losses.importance_weights(reference, batch.behaviour, options.importance_cap)
    log_prob = _steps(selector, feed).sequence_log_prob()
    terms = losses.grpo_terms(
        losses.GrpoGroups(log_prob, reference, advantage, chosen, importance),
        losses.GrpoOptions(
            clip_low=options.clip_epsilon,
            clip_high=options.clip_epsilon_high
            if options.clip_epsilon_high is not None
            else options.clip_epsilon,
            dual_clip=options.dual_clip,
            kl_estimator=options.kl_estimator,
            kl_direction=options.kl_direction,
        ),
    )
    figures = {"ppo": terms.ppo, "kl": terms.kl}
    figures |= {"clipped_low": terms.clipped_low, "clipped_high": terms.clipped_high}
    figures |= _spread(terms.ratio, advantage, chosen)
    if options.importance_cap is not None:
        figures["effective_sample_size"] = losses.effective_sample_size(importance, chosen)
    return Objective(terms.ppo + settings.beta * terms.kl, weight, _detached(figures))


def grpo_advantages(batch: Batch, chosen: Tensor, config: TrainConfig) -> Tensor:
    """Advantages [B, N], 0 outside ``chosen``.

    ``full``: over the whole group. ``subset``, the legacy way: z-scored rewards of the whole
    group, then once more over the chosen with a floor of 0.1 under the std.
    """
    options = config.grpo
    if options.topk_baseline == "subset":
        scored = losses.z_score(batch.reward, batch.mask)
        return losses.advantages(
            scored,
            chosen,
            options.advantage,
            floor=losses.SUBSET_STD_FLOOR,
            clip=options.advantage_clip,
        )
    full = losses.advantages(
        batch.reward, batch.mask, options.advantage, clip=options.advantage_clip
    )
    return full.masked_fill(~chosen, 0.0)


def group_weights(batch: Batch, stage: str, config: TrainConfig) -> Tensor:
    """Weight [B] of each group in the loss: what becomes of tied groups.

    RCE: as ``tied_groups`` says. GRPO: a tied group has no advantage, and keeps its KL gradient
    only with ``tied_kl`` (or ``tied_groups = keep``, the legacy behaviour). SFT: ties do not
    matter, the best candidate is what it is.
    """
    weight = torch.ones(len(batch), dtype=torch.float32)
    policy = config.run.tied_groups
    if stage == "sft" or policy == "keep" or (stage == "grpo" and config.grpo.tied_kl):
        return weight
    share = config.run.tied_weight if policy == "downweight" and stage == "rce" else 0.0
    return weight.masked_fill(losses.tied_groups(batch.reward, batch.mask), share)


STAGES: dict[str, Stage] = {"sft": sft, "rce": rce, "grpo": grpo}


def _steps(selector: Selector, feed: Feed) -> Steps:
    batch = feed.batch
    return selector.steps(feed.query, feed.pool, batch.positions, batch.step_mask)


def _spread(ratio: Tensor, advantage: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Quantiles of the ratio and spread of the advantages over the chosen, per group."""
    shown = ratio.masked_fill(~chosen, float("nan"))
    quantiles = shown.nanquantile(torch.tensor([0.05, 0.5, 0.95], device=ratio.device), dim=-1)
    count = chosen.sum(-1).clamp(min=1)
    spread = (advantage.masked_fill(~chosen, 0.0).square().sum(-1) / count).sqrt()
    names = ("ratio_p05", "ratio_p50", "ratio_p95")
    return dict(zip(names, quantiles, strict=True)) | {"advantage_rms": spread}


def _detached(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in figures.items()}
