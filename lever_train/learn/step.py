"""One step of training: weigh the groups, descend, and say what happened.

In go a batch and the step's settings; out come the figures of the step. The loss must be finite
before the optimizer moves, else the error names step and queries and nothing was changed.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lever_data.errors import LeverError
from lever_train.learn.batch import Batch
from lever_train.learn.distributed import World
from lever_train.learn.loader import Feed, Loader
from lever_train.learn.losses import tied_groups
from lever_train.learn.objectives import STAGES, Objective, Settings, group_weights
from lever_train.learn.schedule import noise_seed
from lever_train.options.train import TrainConfig
from lever_train.selector.model import Selector

FIGURES = {
    "sft": (),
    "rce": ("weighted_reward",),
    "grpo": (
        "ppo",
        "kl",
        "clipped_low",
        "clipped_high",
        "ratio_p05",
        "ratio_p50",
        "ratio_p95",
        "advantage_rms",
    ),
}


class Stepper:
    """Trains one selector in one phase.

    Args:
        phase: ``sft``, ``rce`` or ``grpo``.
        number: place of the phase in the training, part of the noise's seed.
    """

    def __init__(
        self,
        phase: str,
        number: int,
        selector: Selector,
        loader: Loader,
        config: TrainConfig,
        world: World,
    ) -> None:
        self.phase, self.number = phase, number
        self.selector, self.loader = selector, loader
        self.config, self.world = config, world
        self.trained = [p for p in selector.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(phase, self.trained, config)
        self.names = _figure_names(phase, config)

    def step(self, batch: Batch, settings: Settings, step: int) -> Figures:
        """Train on a batch; the figures have NaN for the loss where no group was left.

        Raises:
            LeverError: the loss or the gradient is not finite.
        """
        self.selector.train()
        torch.manual_seed(noise_seed(self.config.run.seed, self.number, step, self.world.rank))
        weight = group_weights(batch, self.phase, self.config)
        kept = weight.nonzero().squeeze(1)
        tied = tied_groups(batch.reward, batch.mask).sum()
        objective = self._objective(batch.select(kept), weight[kept], settings)
        sums = self._sums(objective, len(batch), tied)
        groups, num_tied, total = sums[:3]
        means = [value / total if total else math.nan for value in sums[3:]]
        norm = math.nan
        if total:
            self._require_finite(means[0], "loss", batch, step)
            norm = self._descend(objective, total, settings.lr_factor, batch, step)
        figures = {"groups": groups, "tied": num_tied, "weight": total}
        return figures | dict(zip(self.names, means, strict=True)) | {"gradient_norm": norm}

    def _objective(self, batch: Batch, weight: Tensor, settings: Settings) -> Objective | None:
        if not len(batch):
            return None
        feed: Feed = self.loader.feed(batch)
        with self._autocast():
            return STAGES[self.phase](
                self.selector, feed, weight.to(self.loader.device), settings, self.config
            )

    def _sums(self, objective: Objective | None, groups: int, tied: Tensor) -> list[float]:
        """Groups, tied groups, weight, weighted sums of loss and figures; of all processes."""
        counts = torch.tensor([float(groups), float(tied)], dtype=torch.float64)
        parts = torch.zeros(1 + len(self.names), dtype=torch.float64)
        if objective is not None:
            weight = objective.weight.detach()
            values = [objective.per_group.detach()]
            values += [objective.figures[name] for name in self.names[1:]]
            sums = [weight.sum(), *((weight * v).sum() for v in values)]
            parts = torch.stack([s.float() for s in sums]).cpu().double()
        summed: list[float] = self.world.sum(torch.cat([counts, parts])).tolist()
        return summed

    def _descend(
        self, objective: Objective | None, total: float, lr_factor: float, batch: Batch, step: int
    ) -> float:
        """Backward, clip, step; returns the norm of the gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        if objective is not None:
            (objective.per_group * objective.weight / total).sum().backward()  # type: ignore[no-untyped-call]
        self.world.sum_gradients(self.trained)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.config.run.gradient_clip))
        self._require_finite(norm, "norm of the gradient", batch, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.optimizer.step()
        return norm

    def _require_finite(self, value: float, what: str, batch: Batch, step: int) -> None:
        if not math.isfinite(value):
            raise LeverError(
                f"the {what} is not finite at step {step} of {self.phase}",
                where=f"queries {batch.query[:20].tolist()}",
                value=value,
                hint="the last good checkpoint stays; look at the rewards and the embeddings of "
                "these queries, or lower the learning rate",
            )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.run.precision == "float32":
            return nullcontext()
        return torch.autocast(self.loader.device.type, torch.bfloat16)


Figures = dict[str, float]


def make_optimizer(
    phase: str, parameters: list[nn.Parameter], config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW with the phase's learning rate and weight decay."""
    rates = {"sft": config.sft.lr, "rce": config.rce.lr, "grpo": config.grpo.lr}
    decay = config.sft.weight_decay if phase == "sft" else config.run.weight_decay
    optimizer = torch.optim.AdamW(
        parameters, lr=rates[phase], weight_decay=decay, fused=parameters[0].device.type != "mps"
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _figure_names(phase: str, config: TrainConfig) -> tuple[str, ...]:
    names = FIGURES[phase]
    if phase == "rce" and config.rce.top1_only:
        names = ()
    if phase == "grpo" and config.grpo.importance_cap is not None:
        names = (*names, "effective_sample_size")
    return ("loss", *names)
