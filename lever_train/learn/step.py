"""One step of training, forward to optimizer, in one function.

In go a batch and its place in the training; out come the figures of the step. What changes from
step to step (temperature, learning rate, noise, β, top-k) is a pure function of that place or of
the last KL, so a resumed training computes the same and no generator is kept.
"""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lever_data.errors import LeverError
from lever_train.learn import losses
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.distributed import World
from lever_train.options.train import TrainConfig
from lever_train.selector.model import Selector

Figures = dict[str, float]
BETA_MIN, BETA_MAX = 0.001, 10.0
BETA_FACTOR = 1.5
_MASK = 0xFFFFFFFFFFFFFFFF
_FIGURES = {
    "sft": ("loss",),
    "rce": ("loss", "weighted_reward"),
    "dense": ("loss", "expected_reward"),
    "grpo": (
        "loss",
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


@dataclass(frozen=True)
class Phase:
    """One stage of a training. The noise of its steps depends on its ``number``, the order of the
    data on its epochs' numbers, counted from ``first_epoch`` over all phases."""

    name: str  # sft | rce | grpo | dense
    number: int
    epochs: int
    first_epoch: int = 0


class AdamW(torch.optim.AdamW):
    """AdamW as it stands below its decorators, which only matter to ``torch.compile``: the first
    call of each imports ``torch._dynamo``, 2 s of processor time in every training's process."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Learner:
    """A selector in one phase, and the optimizer that trains it.

    Args:
        steps: of the whole phase, what schedules run over.
        reference: the policy π_old of GRPO, in eval mode; ``None`` in other phases.
    """

    def __init__(
        self,
        phase: Phase,
        selector: Selector,
        loader: Loader,
        config: TrainConfig,
        *,
        steps: int,
        reference: Selector | None = None,
        world: World = World(),
    ) -> None:
        self.phase, self.selector, self.reference = phase, selector, reference
        self.loader, self.config, self.steps, self.world = loader, config, steps, world
        self.trained = [p for p in selector.parameters() if p.requires_grad]
        self.rate = getattr(config, phase.name).lr
        decays = {"sft": config.sft.weight_decay, "dense": config.dense.weight_decay}
        self.optimizer = AdamW(
            self.trained,
            lr=self.rate,
            weight_decay=decays.get(phase.name, config.run.weight_decay),
            fused=self.trained[0].device.type != "mps",
        )
        self.figures = _FIGURES[phase.name]
        if phase.name == "rce" and config.rce.top1_only:
            self.figures = ("loss",)
        if phase.name == "grpo" and config.grpo.importance_cap is not None:
            self.figures = (*self.figures, "effective_sample_size")

    def step(self, batch: Batch, step: int, *, epoch: int = 0, beta: float = 0.0) -> Figures:
        """Train on a batch; the figures are NaN where none of its groups can teach anything.

        Args:
            batch: this process's share of the groups, on the CPU.
            step: batches of the phase before this one.
            epoch: of the phase, from 0.
            beta: weight of the KL in GRPO.

        Raises:
            LeverError: the loss or the gradient is not finite; it names the step and the queries,
                and nothing was changed.
        """
        config, name, device = self.config, self.phase.name, self.loader.device
        self.selector.train()
        # dropout is seeded by its place: a resumed training draws what the whole one drew
        noise = noise_seed(config.run.seed, self.phase.number, step, self.world.rank)
        if device.type == "cpu":  # `torch.manual_seed` formats the stack for each accelerator
            torch.default_generator.manual_seed(noise)
        else:
            torch.manual_seed(noise)

        # groups whose candidates are all worth the same teach RCE to imitate wrong answers
        # (LEGACY fault 6): their weight is 0 unless the config says otherwise, and they go before
        # the forward pass, which they would only lengthen
        weight: Float[Tensor, " B"] = losses.group_weights(batch, name, config)
        kept = weight.nonzero().squeeze(1)
        tied = float(losses.tied_groups(batch.reward, batch.mask).sum())
        sums = torch.zeros(1 + len(self.figures), dtype=torch.float64)

        # forward: one pass per query gives the terms of every step of all its candidates; the
        # stages differ only in how they weigh them
        loss: Float[Tensor, " G"] | None = None  # of the G groups kept
        if len(kept):
            part, share = batch.select(kept).to(device), weight[kept].to(device)
            query, pool = self.loader.vectors(part)
            with self._autocast():
                if name == "dense":
                    loss, figures = losses.dense(self.selector, query, pool, part, config.dense)
                else:
                    terms = self.selector.steps(query, pool, part.positions, part.step_mask)
                    if name == "sft":
                        loss, figures = losses.sft(terms, part, config)
                    elif name == "rce":
                        loss, figures = losses.rce(terms, part, self.temperature(step), config)
                    else:
                        assert self.reference is not None
                        with torch.no_grad():
                            old = self.reference.steps(query, pool, part.positions, part.step_mask)
                        reference, top_k = old.sequence_log_prob(), self.top_k(epoch)
                        loss, figures = losses.grpo(terms, reference, part, top_k, beta, config)
            values = [loss.detach(), *(figures[n] for n in self.figures[1:])]
            weighed = [share.sum(), *((share * value).sum() for value in values)]
            sums = torch.stack([value.float() for value in weighed]).cpu().double()

        # a batch is the groups of all processes, so its loss is a mean over all their weight
        counts = torch.tensor([len(batch), tied], dtype=torch.float64)
        groups, tied, total, *summed = self.world.sum(torch.cat([counts, sums])).tolist()
        means = [value / total if total else math.nan for value in summed]

        # backward, clip, step; NaN is found before anything moves
        norm = math.nan
        if total:
            self._require_finite(means[0], "loss", batch, step)
            self.optimizer.zero_grad(set_to_none=True)
            if loss is not None:
                (loss * share / total).sum().backward()
            self.world.sum_gradients(self.trained)
            norm = float(nn.utils.clip_grad_norm_(self.trained, config.run.gradient_clip))
            self._require_finite(norm, "norm of the gradient", batch, step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * self.rate_factor(step)
            self.optimizer.step()

        found = {"groups": groups, "tied": tied, "weight": total}
        found |= dict(zip(self.figures, means, strict=True)) | {"gradient_norm": norm}
        if name == "rce":
            found["temperature"] = self.temperature(step)
        elif name == "grpo":
            found["beta"] = beta
        return found

    def temperature(self, step: int) -> float:
        """τ of RCE at a step."""
        rce = self.config.rce
        return rce_temperature(step, self.steps, rce.temperature_start, rce.temperature_end)

    def rate_factor(self, step: int) -> float:
        """Factor of the learning rate: it rises in SFT, falls to 0 in the dense stage."""
        if self.phase.name == "dense":
            return 1.0 - step / self.steps
        if self.phase.name != "sft":
            return 1.0
        return warm_up(step, self.steps, self.config.sft.warm_up)

    def top_k(self, epoch: int) -> int | None:
        """Candidates that train in an epoch of GRPO; ``None``: all of them."""
        grpo = self.config.grpo
        return (grpo.early_top_k if epoch < grpo.early_epochs else grpo.late_top_k) or None

    def _require_finite(self, value: float, what: str, batch: Batch, step: int) -> None:
        if not math.isfinite(value):
            raise LeverError(
                f"the {what} is not finite at step {step} of {self.phase.name}",
                where=f"queries {batch.query[:20].tolist()}",
                value=value,
                hint="the last good checkpoint stays; look at the rewards and the embeddings of "
                "these queries, or lower the learning rate",
            )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.run.precision == "float32":
            return nullcontext()
        return torch.autocast(self.loader.device.type, torch.bfloat16)


def rce_temperature(step: int, total: int, start: float = 2.0, end: float = 0.5) -> float:
    """τ of step ``step`` (from 0) of ``total``: linear from ``start`` to ``end`` in step/(total-1).

    A single step has τ = ``end``.
    """
    if total <= 1:
        return end
    return start + (end - start) * (step / (total - 1))


def adapt_beta(
    kl: float, beta: float, low: float = 0.01, high: float = 0.1, factor: float = BETA_FACTOR
) -> float:
    """β after a step with this KL: × factor above ``high``, ÷ factor below ``low``, bounded."""
    if kl > high:
        beta *= factor
    elif kl < low:
        beta /= factor
    return min(max(beta, BETA_MIN), BETA_MAX)


def warm_up(step: int, total: int, share: float) -> float:
    """Factor of the learning rate: linear to 1 over the first ``share`` of the steps, then 1."""
    steps = int(total * share)
    return 1.0 if step >= steps else (step + 1) / steps


def noise_seed(seed: int, phase: int, step: int, rank: int = 0) -> int:
    """Seed of the dropout noise of one step, another for every step and process."""
    mixed = (seed * 0x9E3779B97F4A7C15 + phase * 0xBF58476D1CE4E5B9) & _MASK
    mixed = (mixed ^ (step * 0x94D049BB133111EB) ^ (rank << 48)) & _MASK
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & _MASK
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF
