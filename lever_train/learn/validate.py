"""How good the selector is on queries it did not train on, from stored candidates alone.

In go the selector and a loader; out come means over the held-out groups. Beside the RCE loss
(τ = 1, every group, as the legacy code has it): what the selector's favourite among the stored
candidates earns, the expected reward under its policy, and the rows to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.relations.stream import Selection
from lever_train.learn import losses
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.distributed import World
from lever_train.options.train import TrainConfig
from lever_train.selector.model import Selector

_JUDGED_BY = {
    "reward": "val_pick_reward",
    "accuracy": "val_pick_accuracy",
    "expected_reward": "val_expected_reward",
    "loss": "val_loss",
}


def judged(figures: Mapping[str, float], config: TrainConfig) -> float:
    """The figure of an epoch that decides which checkpoint is best; NaN without validation.

    SFT has no rewards to compare: its loss decides.

    Raises:
        UsageError: the view has no stored accuracy to select by.
    """
    if "val_loss" not in figures:
        return math.nan
    name = _judged_by(config)
    if name not in figures:
        raise UsageError(
            "the view has no column score to select the best checkpoint by",
            value="--select-by accuracy",
            hint="--select-by reward",
        )
    return figures[name]


def is_better(value: float, best: float, config: TrainConfig) -> bool:
    """Whether a later epoch takes the place of the best so far; without validation it does."""
    if math.isnan(value):
        return True
    return value < best if _judged_by(config) == "val_loss" else value > best


def _judged_by(config: TrainConfig) -> str:
    return "val_loss" if config.run.stage == "sft" else _JUDGED_BY[config.run.select_by]


def require_finite(selector: Selector, figures: Mapping[str, float], place: str) -> None:
    """Refuse an epoch that left NaN or infinity, which a loss need not show: it is the loss before
    a step that is checked, and the last step has none after it.

    Args:
        figures: of the epoch; those of validation count.
        place: the epoch and the step, as the error names them.

    Raises:
        LeverError: a parameter or a validation figure is not finite; it names the first.
    """
    for name, parameter in selector.named_parameters():
        if not parameter.isfinite().all():
            raise LeverError(
                f"the weights are not finite after {place}",
                where=name,
                hint="the last good checkpoint stays; lower the learning rate or the weight decay",
            )
    for name, value in figures.items():
        if name.startswith("val_") and not math.isfinite(value):
            raise LeverError(
                f"a validation figure is not finite after {place}",
                where=name,
                value=value,
                hint="the last good checkpoint stays; look at the rewards and log-probabilities "
                "of the validation queries, or lower the learning rate",
            )


@torch.no_grad()
def validate(
    selector: Selector, loader: Loader, selection: Selection, config: TrainConfig, world: World
) -> dict[str, float]:
    """Means over the groups of ``selection``.

    ``val_loss``: RCE at τ 1, or the SFT loss. ``val_pick_*``: the stored candidate with the
    highest log-probability under the selector. ``val_expected_reward``: self-normalised
    importance estimate Σ w r / Σ w, with ``val_ess``, its effective sample size.
    ``val_oracle_*``: the best stored candidate; ``val_behaviour_*``: the mean stored one, which is
    the policy that made the data. Accuracies only where the view has ``score``.
    """
    selector.eval()
    names = figure_names(config, selection)
    total = torch.zeros(1 + len(names), dtype=torch.float64)  # the count, then the sums
    for batch in loader.batches(selection, order="file"):
        if not len(batch):
            continue
        figures = group_figures(selector, loader, batch, config)
        sums = [figures[name].double().sum().cpu() for name in names]
        total += torch.stack([torch.tensor(float(len(batch)), dtype=torch.float64), *sums])
    summed = world.sum(total)
    return dict(zip(names, (summed[1:] / summed[0]).tolist(), strict=True))


def figure_names(config: TrainConfig, selection: Selection) -> list[str]:
    """The names of the figures, in order."""
    names = ["val_loss"]
    if config.run.stage == "sft":
        return names
    for kind in ("reward", "accuracy") if "score" in selection.columns else ("reward",):
        names += [f"val_pick_{kind}", f"val_oracle_{kind}", f"val_behaviour_{kind}"]
    return [*names, "val_expected_reward", "val_ess"]


def group_figures(
    selector: Selector, loader: Loader, batch: Batch, config: TrainConfig
) -> dict[str, Float[Tensor, " B"]]:
    """Every figure of every group; accuracies mean nothing where none is stored."""
    batch = batch.to(loader.device)
    steps = selector.steps(*loader.vectors(batch), batch.positions, batch.step_mask)
    if config.run.stage == "sft":
        return {"val_loss": losses.sft(steps, batch, config)[0]}
    cross_entropy = steps.cross_entropy(config.model.label_smoothing)
    weights = losses.rce_weights(batch.reward, batch.mask, 1.0)
    figures = {"val_loss": losses.rce_groups(cross_entropy, weights)}
    log_prob = steps.sequence_log_prob().double()
    pick = log_prob.masked_fill(~batch.mask, float("-inf")).argmax(-1, keepdim=True)
    figures |= _compare("reward", batch.reward, pick, batch.mask)
    # a missing accuracy counts as 0, as a missing score does in the reward
    figures |= _compare("accuracy", batch.accuracy.nan_to_num(0.0), pick, batch.mask)
    expected, ess = expected_reward(log_prob, batch.behaviour, batch.reward, batch.mask)
    return figures | {"val_expected_reward": expected, "val_ess": ess}


def expected_reward(
    log_prob: Float[Tensor, "B N"],
    behaviour: Float[Tensor, "B N"],
    reward: Float[Tensor, "B N"],
    mask: Bool[Tensor, "B N"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Self-normalised importance estimate of E_π[r] and its effective sample size.

    w = π(c) / b(c). A candidate with a stored log-probability counts as drawn with it; one without
    (random, retrieved) as if drawn uniformly among the stored, whose constant is the group's mean
    weight of the known ones, or 1 where none is known.
    """
    known = mask & ~behaviour.isnan()
    log_b = behaviour.masked_fill(~known, 0.0).to(log_prob.dtype)
    mean_b = log_b.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    log_w = log_prob - torch.where(known, log_b, mean_b)
    log_w = log_w.masked_fill(~mask, float("-inf"))
    weights = log_w.softmax(-1)
    estimate = (weights * reward.to(weights.dtype)).sum(-1)
    return estimate, losses.effective_sample_size(weights, mask)


def _compare(
    kind: str, worth: Float[Tensor, "B N"], pick: Int[Tensor, "B 1"], mask: Bool[Tensor, "B N"]
) -> dict[str, Float[Tensor, " B"]]:
    best = worth.masked_fill(~mask, float("-inf")).amax(-1)
    mean = worth.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    return {
        f"val_pick_{kind}": worth.gather(-1, pick).squeeze(-1),
        f"val_oracle_{kind}": best,
        f"val_behaviour_{kind}": mean,
    }
