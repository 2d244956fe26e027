"""What a training starts from: its phases, its selector, and which parameters train.

In goes the config; out come the phases in order and a selector, fresh or from a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lever_data.errors import LeverError, UsageError
from lever_train.learn.objectives import Settings
from lever_train.options.train import TrainConfig
from lever_train.selector.checkpoint import Checkpoint, load_selector
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector

# LEGACY: freezing the backbone trains the attention; its norms train with it, our choice
TRAINED_WHEN_FROZEN = ("cross_attn_layers.", "attn_norms.")

SHAPE = (  # options that a checkpoint decides
    *("selector", "hidden", "num_layers", "num_heads", "max_shots"),
    *("decoder_gru", "step_embedding", "can_stop"),
)

_SHOWN = {  # of an epoch's figures, and how the row of the epoch calls them
    "train_loss": "loss",
    "train_kl": "kl",
    "train_beta": "beta",
    "val_loss": "val_loss",
    "val_pick_accuracy": "val_pick_accuracy",
    "val_expected_reward": "val_expected_reward",
    "val_ess": "ess",
}


@dataclass(frozen=True)
class Phase:
    """One stage of a training: ``epochs`` epochs, numbered from ``first_epoch`` over all phases
    (the order of the data depends on that number)."""

    name: str  # sft | rce | grpo
    epochs: int
    first_epoch: int

    def describe(self, config: TrainConfig) -> str:
        """The line that opens the phase."""
        if self.name == "sft":
            return f"[SFT] epochs={self.epochs}, lr={config.sft.lr}, warm_up={config.sft.warm_up}"
        if self.name == "rce":
            low, high = config.rce.temperature_end, config.rce.temperature_start
            return f"[RCE] epochs={self.epochs}, lr={config.rce.lr}, temperature={high} to {low}"
        grpo = config.grpo
        return f"[GRPO] epochs={self.epochs}, lr={grpo.lr}, kl_beta_init={grpo.kl_beta_init}"

    def row(self, epoch: int, figures: Mapping[str, float]) -> str:
        """The row of a finished epoch: what there is of the figures people watch."""
        shown = [f"{t} {figures[name]:.4f}" for name, t in _SHOWN.items() if name in figures]
        tied = f"{figures['tied']:,.0f} of {figures['groups']:,.0f} groups tied"
        return f"[{self.name.upper()}] epoch {epoch}/{self.epochs}: {'  '.join(shown)}  {tied}"

    def settings(self, settings: Settings) -> dict[str, float]:
        """What of the step's settings is logged."""
        if self.name == "sft":
            return {}
        if self.name == "rce":
            return {"temperature": settings.temperature}
        return {"beta": settings.beta}


def phases_of(config: TrainConfig) -> list[Phase]:
    """The phases with at least one epoch.

    Raises:
        UsageError: there is none.
    """
    if config.run.stage == "sft":
        return [Phase("sft", config.sft.epochs, 0)]
    rce, grpo = config.rce.epochs, config.grpo.epochs
    phases = [Phase("rce", rce, 0), Phase("grpo", grpo, rce)]
    found = [phase for phase in phases if phase.epochs]
    if not found:
        raise UsageError("nothing to train", value="--rce-epochs 0 --grpo-epochs 0")
    return found


def new_selector(
    config: TrainConfig, dim: int, say: Callable[[str], None]
) -> tuple[Selector, TrainConfig]:
    """A fresh selector for embeddings of width ``dim``, or the one of ``sft_checkpoint``.

    A checkpoint decides the shape; where the config states another, that is an error. The config
    comes back with the shape there is.
    """
    model = config.model
    if model.sft_checkpoint is None:
        torch.manual_seed(config.run.seed)
        return make_selector(dim, model), config
    selector, found = load_selector(
        model.sft_checkpoint, dropout=model.dropout, attention_dropout=model.attention_dropout
    )
    _require_same_shape(config, found, dim)
    say(f"start from {model.sft_checkpoint} ({found.layout}, {len(found.tensors)} tensors matched)")
    if found.foreign:
        say(f"not the selector's, left out: {', '.join(found.foreign)}")
    actual = model.model_copy(update={name: getattr(found.config, name) for name in SHAPE})
    return selector, config.model_copy(update={"model": actual})


def frozen_copy(selector: Selector) -> Selector:
    """A copy that no longer changes, in eval mode."""
    return copy.deepcopy(selector).requires_grad_(False).eval()


def set_trained(selector: Selector, phase: Phase, config: TrainConfig) -> list[str]:
    """Choose the parameters that train in the phase; returns lines that say which."""
    freeze = phase.name == "grpo" and config.grpo.freeze_backbone
    trained: list[str] = []
    frozen: list[str] = []
    for name, parameter in selector.named_parameters():
        trains = not freeze or name.startswith(TRAINED_WHEN_FROZEN)
        parameter.requires_grad_(trains)
        (trained if trains else frozen).append(name)
    if not trained:
        raise UsageError("nothing is left to train: the selector has no attention layer")
    lines = [f"trains: {', '.join(trained)}"]
    return [*lines, f"frozen: {', '.join(frozen)}"] if frozen else lines


def _require_same_shape(config: TrainConfig, found: Checkpoint, dim: int) -> None:
    model = config.model
    if found.dim != dim:
        raise LeverError(
            f"the checkpoint takes embeddings of width {found.dim}, the embeddings have {dim}",
            where=str(model.sft_checkpoint),
        )
    for name in SHAPE:
        wanted, actual = getattr(model, name), getattr(found.config, name)
        if name in model.model_fields_set and wanted != actual:
            raise UsageError(
                f"the checkpoint has {name} = {actual}, the config says {wanted}",
                where=str(model.sft_checkpoint),
                hint="leave the option out: the checkpoint decides its shape",
            )
