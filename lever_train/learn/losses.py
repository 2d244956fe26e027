"""Every loss of the trainer: SFT, RCE, GRPO, from a selector's step terms to one number per group.

In go the terms of every step (:class:`Steps`) and a :class:`Batch` of B groups of at most N
candidates, padded with a mask; out come a loss per group to average and descend on, and figures to
log, also per group. Formulas are those of LEGACY.md; what differs is said where it differs. A
padded candidate never counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lever_data.errors import LeverError
from lever_train.learn.batch import Batch
from lever_train.options.train import DenseConfig, GrpoConfig, TrainConfig
from lever_train.selector.model import RARE, Pool, Selector, Steps

REWARD_STD_FLOOR = 1e-12  # legacy: a group whose std is at most this keeps its raw rewards
SUBSET_STD_FLOOR = 0.1  # legacy: floor of the std when advantages are taken over a subset

PerGroup = Float[Tensor, " B"]
PerCandidate = Float[Tensor, "B N"]
Candidates = Bool[Tensor, "B N"]
Loss = tuple[PerGroup, dict[str, PerGroup]]  # to descend on; figures, detached


def sft(steps: Steps, batch: Batch, config: TrainConfig) -> Loss:
    """Cross-entropy of the best candidate (highest InfoScore, ties by ordinal), mean over its
    steps; with ``all_beams``, the legacy definition, the mean of that over all candidates."""
    cross_entropy = steps.cross_entropy(config.model.label_smoothing)
    if config.sft.all_beams:
        length = steps.mask.sum(-1).clamp(min=1)
        count = batch.mask.sum(-1).clamp(min=1)
        # a selector that can stop has a term for a padded candidate: to stop at once
        each = (cross_entropy.sum(-1) / length).masked_fill(~batch.mask, 0.0)
        return each.sum(-1) / count, {}
    best = top_k_mask(batch.reward, batch.mask, 1).int().argmax(-1)
    return one_candidate_groups(cross_entropy, steps.mask, best), {}


def rce(steps: Steps, batch: Batch, temperature: float, config: TrainConfig) -> Loss:
    """Reward-weighted cross-entropy at temperature τ, in the variant the config names."""
    cross_entropy = steps.cross_entropy(config.model.label_smoothing)
    if config.rce.top1_only:
        first = torch.zeros_like(batch.query)
        return one_candidate_groups(cross_entropy, steps.mask, first), {}
    worth = batch.reward
    if config.rce.rank:
        worth = ranks(worth, batch.mask)
    elif config.rce.use_normalized_reward:
        worth = z_score(worth, batch.mask, clamp=config.run.normalize_clamp)
    weights = rce_weights(worth, batch.mask, temperature)
    figures = {"weighted_reward": (weights * batch.reward).sum(-1)}
    return rce_groups(cross_entropy, weights), figures


def dense(
    selector: Selector, query: Tensor, pool: Pool, batch: Batch, options: DenseConfig
) -> Loss:
    """The candidates of a group against each other, by the objective that is named.

    Of single demonstrations, and of none, the scores are compared; of longer pointers their
    log-probabilities, and by ``pointwise`` the scores of the last pick after those before it.
    """
    if batch.positions.shape[-1] == 1:
        # where nothing is shown the pointer ends, and the end stands behind the pool; a padded
        # candidate is none of these, as a selector that cannot stop has no such score
        is_empty = batch.mask & ~batch.step_mask[..., 0]
        at = batch.positions[..., 0].masked_fill(is_empty, pool.size)
        score = selector.begin(query, pool).scores()[:, 0].float().gather(1, at)
    elif options.objective == "pointwise":
        score = last_scores(selector, query, pool, batch)
    else:
        terms = selector.steps(query, pool, batch.positions, batch.step_mask)
        score = terms.sequence_log_prob()
    share = score.detach().masked_fill(~batch.mask, float("-inf")).softmax(-1)
    figures = {"expected_reward": (share * batch.reward).sum(-1)}
    mask = _readable(selector, pool, batch)
    if options.objective == "hinge":
        return pairwise_hinge(score, batch.reward, mask, options.margin), figures
    if options.objective == "pointwise":
        return pointwise(score, batch.reward, mask), figures
    return listwise(score, batch.reward, mask, options.temperature), figures


def _readable(selector: Selector, pool: Pool, batch: Batch) -> Candidates:
    """The candidates that are compared: where votes are read, those whose answers are not hidden.

    Hidden are those of the query's own question. They are right as a rule, and to the selector they
    look like answers that nobody votes for: it would learn to show such to new questions, which
    have none. A group of nothing else keeps them.
    """
    if not selector.config.votes:
        return batch.mask
    assert pool.features is not None
    own = pool.features[..., selector.num_features :].diagonal(dim1=1, dim2=2) > 0
    shown = own.gather(1, batch.positions.flatten(1)).view_as(batch.positions)
    seen = batch.mask & (shown | ~batch.step_mask).all(-1)
    return torch.where(seen.any(-1, keepdim=True), seen, batch.mask)


def last_scores(selector: Selector, query: Tensor, pool: Pool, batch: Batch) -> PerCandidate:
    """Of every pointer the score of its last pick after those before it; 0 where padded.

    Raises:
        LeverError: the selector can end a pointer: two rewards would be of one pick.
    """
    if selector.config.ends_pointers:
        raise LeverError(
            "the pointwise objective of a selector that can stop compares single demonstrations",
            value=f"a pointer of {batch.positions.shape[-1]}",
            hint="train on candidates of one shot, or by --dense-objective listwise",
        )
    B, N, S = batch.positions.shape
    length = batch.step_mask.sum(-1)
    history, score = selector.begin(query, pool), torch.zeros(B, N, device=query.device)
    parent = torch.zeros(B, N, dtype=torch.long, device=query.device)
    for t in range(S):
        here = history.scores().float().expand(-1, N, -1)
        here = here.gather(2, batch.positions[..., t, None]).squeeze(-1)
        score = torch.where(length == t + 1, here, score)
        if t + 1 < S:
            # pointers that differ in their last pick alone, as `--last-alone` makes them, are one
            # partial sequence: scores after N of them would take N times as long
            is_longer = length > t + 1
            first = is_longer.int().argmax(-1)[:, None, None].expand(-1, 1, S)
            before = batch.positions[..., : t + 1]
            one = batch.positions.gather(1, first)[..., : t + 1]
            is_one = bool(((before == one).all(-1) | ~is_longer).all())
            chosen = one[..., t] if is_one else before[..., t]
            history = history.advance(parent[:, : chosen.shape[1]], chosen)
            if not is_one:
                parent = torch.arange(N, device=query.device).expand(B, N)
    return score


def grpo(
    steps: Steps,
    reference: PerCandidate,
    batch: Batch,
    top_k: int | None,
    beta: float,
    config: TrainConfig,
) -> Loss:
    """Clipped policy gradient on group advantages plus β KL to the reference policy, whose
    log-probabilities of the candidates are ``reference``."""
    options = config.grpo
    chosen = top_k_mask(batch.reward, batch.mask, top_k)
    advantage = grpo_advantages(batch, chosen, config)
    importance = torch.ones_like(reference)
    if options.importance_cap is not None:
        importance = importance_weights(reference, batch.behaviour, options.importance_cap)
    log_prob = steps.sequence_log_prob()
    terms = grpo_terms(log_prob, reference, advantage, chosen, importance, options)
    ratio = terms.pop("ratio")
    figures = terms | _spread(ratio, advantage, chosen)
    if options.importance_cap is not None:
        figures["effective_sample_size"] = effective_sample_size(importance, chosen)
    loss = terms["ppo"] + beta * terms["kl"]
    return loss, {name: value.detach() for name, value in figures.items()}


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


def rce_weights(rewards: PerCandidate, mask: Candidates, temperature: float) -> PerCandidate:
    """softmax(r / τ) within each group, 0 where padded."""
    return (rewards / temperature).masked_fill(~mask, float("-inf")).softmax(-1)


def rce_groups(cross_entropy: Float[Tensor, "B N S"], weights: PerCandidate) -> PerGroup:
    """Reward-weighted cross-entropy of each group: Σ_i w_i Σ_steps CE.

    ``cross_entropy`` is 0 where padded; ``weights`` sum to 1 in each group.
    """
    return (weights.to(cross_entropy.dtype) * cross_entropy.sum(-1)).sum(-1)


def listwise(
    log_prob: PerCandidate, rewards: PerCandidate, mask: Candidates, temperature: float
) -> PerGroup:
    """Cross-entropy of each group's own distribution with softmax(r / τ), both over the group.

    The candidates are compared with each other alone, whatever else the pool holds (ListNet, Cao
    et al. 2007); RCE weighs the log-probabilities over the whole pool instead.
    """
    share = log_prob.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
    return -(rce_weights(rewards, mask, temperature).to(share.dtype) * share).sum(-1)


def pointwise(score: PerCandidate, rewards: PerCandidate, mask: Candidates) -> PerGroup:
    """Sum over a group of the binary cross-entropy of σ(score - 3) and the reward, cut to [0, 1].

    Its best score rises with a candidate's expected reward alone. The softmax of a list divides
    what is right among all that are right, and so thinks less of an answer that many show.
    """
    target = rewards.clamp(0.0, 1.0).to(score.dtype)
    loss = binary_cross_entropy_with_logits(score - RARE, target, reduction="none")
    return loss.masked_fill(~mask, 0.0).sum(-1)


def pairwise_hinge(
    log_prob: PerCandidate, rewards: PerCandidate, mask: Candidates, margin: float
) -> PerGroup:
    """Mean of max(0, margin - (log p_i - log p_j)) over the pairs of a group with r_i > r_j; 0 for
    a tied group (Joachims 2002)."""
    better = (rewards[:, :, None] > rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    short = (margin - (log_prob[:, :, None] - log_prob[:, None, :])).clamp(min=0.0)
    total = short.masked_fill(~better, 0.0).sum((1, 2))
    return total / better.sum((1, 2)).clamp(min=1)


def one_candidate_groups(
    cross_entropy: Float[Tensor, "B N S"],
    step_mask: Bool[Tensor, "B N S"],
    chosen: Int[Tensor, " B"],
) -> PerGroup:
    """Cross-entropy of one candidate of each group, mean over its steps.

    ``chosen`` is its ordinal: 0 is the legacy ``top1_only``; the best beam is SFT.
    """
    rows = torch.arange(len(chosen), device=chosen.device)
    steps = step_mask[rows, chosen].sum(-1).clamp(min=1)
    return cross_entropy[rows, chosen].sum(-1) / steps


def kl_estimate(log_ratio: PerCandidate, estimator: str, direction: str) -> PerCandidate:
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


def grpo_terms(
    log_prob: PerCandidate,
    reference: PerCandidate,
    advantage: PerCandidate,
    chosen: Candidates,
    importance: PerCandidate,
    options: GrpoConfig,
) -> dict[str, Tensor]:
    """Means over a group's ``chosen`` candidates: ``ppo``, which is
    -mean(min(ρ A, clip(ρ, 1 - low, 1 + high) A)), and ``kl``; the loss is ``ppo + β kl``.

    ρ = exp(log π_new - log π_ref) of the whole sequence, returned [B, N] as ``ratio``;
    ``importance`` multiplies each candidate's PPO term. ``clipped_low`` and ``clipped_high`` are
    the shares of candidates whose gradient the clip stops.
    """
    low = options.clip_epsilon
    high = low if options.clip_epsilon_high is None else options.clip_epsilon_high
    log_ratio = (log_prob - reference).masked_fill(~chosen, 0.0)
    ratio = log_ratio.exp()
    advantage = advantage.to(ratio.dtype)
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    if options.dual_clip is not None:  # arXiv 1912.09729: bounds the loss where A < 0
        floor = options.dual_clip * advantage
        gain = torch.where(advantage < 0, torch.maximum(gain, floor), gain)

    def mean(values: Tensor) -> PerGroup:
        inside = values.to(ratio.dtype).masked_fill(~chosen, 0.0).sum(-1)
        return inside / chosen.sum(-1).clamp(min=1)

    return {
        "ppo": -mean(gain * importance.to(ratio.dtype)),
        "kl": mean(kl_estimate(log_ratio, options.kl_estimator, options.kl_direction)),
        "clipped_low": mean((ratio < 1.0 - low) & (advantage < 0)),
        "clipped_high": mean((ratio > 1.0 + high) & (advantage > 0)),
        "ratio": ratio.detach(),
    }


def importance_weights(
    reference: PerCandidate, behaviour: PerCandidate, truncate: float
) -> PerCandidate:
    """min(π_ref / π_behaviour, truncate) from stored log-probabilities.

    1 where the behaviour log-probability is not known (NaN).
    """
    weight = (reference - behaviour.to(reference.dtype)).exp().clamp(max=truncate)
    return torch.where(torch.isnan(behaviour), torch.ones_like(weight), weight).detach()


def effective_sample_size(weights: PerCandidate, mask: Candidates) -> PerGroup:
    """(Σ w)² / Σ w² per group; between 1 and the group's size."""
    kept = weights.masked_fill(~mask, 0.0)
    return kept.sum(-1).square() / kept.square().sum(-1).clamp(min=torch.finfo(kept.dtype).tiny)


def _spread(
    ratio: PerCandidate, advantage: PerCandidate, chosen: Candidates
) -> dict[str, PerGroup]:
    """Quantiles of the ratio and spread of the advantages over the chosen, per group."""
    shown = ratio.masked_fill(~chosen, float("nan"))
    quantiles = shown.nanquantile(torch.tensor([0.05, 0.5, 0.95], device=ratio.device), dim=-1)
    count = chosen.sum(-1).clamp(min=1)
    spread = (advantage.masked_fill(~chosen, 0.0).square().sum(-1) / count).sqrt()
    names = ("ratio_p05", "ratio_p50", "ratio_p95")
    return dict(zip(names, quantiles, strict=True)) | {"advantage_rms": spread}
