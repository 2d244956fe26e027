"""What a training begins with: its phases, its selector, and the parameters that train in each.

In goes a config, out come :class:`~lever_train.learn.step.Phase` and the selector, fresh or from a
checkpoint, which decides its shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lever_data.errors import LeverError, UsageError
from lever_train.learn.step import Phase
from lever_train.options.train import TrainConfig
from lever_train.selector.checkpoint import load_selector
from lever_train.selector.features import FeatureSelector
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector

if TYPE_CHECKING:
    from lever_train.inputs.pair_features import PairFeatures

# LEGACY: freezing the backbone trains the attention; its norms train with it, our choice
TRAINED_WHEN_FROZEN = ("cross_attn_layers.", "attn_norms.")
SHAPE = (  # options that a checkpoint decides
    *("selector", "hidden", "num_layers", "num_heads", "max_shots"),
    *("decoder_gru", "step_embedding", "can_stop", "votes", "low_rank", "mixture"),
)


def phases_of(config: TrainConfig) -> list[Phase]:
    """The phases with at least one epoch.

    Raises:
        UsageError: there is none.
    """
    if config.run.stage != "rl":
        stage = config.run.stage
        return [Phase(stage, 0, getattr(config, stage).epochs)]
    rce, grpo = config.rce.epochs, config.grpo.epochs
    found = [(name, epochs) for name, epochs in (("rce", rce), ("grpo", grpo)) if epochs]
    if not found:
        raise UsageError("nothing to train", value="--rce-epochs 0 --grpo-epochs 0")
    first = {"rce": 0, "grpo": rce}
    return [Phase(name, i, epochs, first[name]) for i, (name, epochs) in enumerate(found)]


def new_selector(
    config: TrainConfig,
    dim: int,
    say: Callable[[str], None],
    features: PairFeatures | None = None,
) -> tuple[Selector, TrainConfig]:
    """A fresh selector for embeddings of width ``dim``, or the one of ``sft_checkpoint``.

    A checkpoint decides the shape; where the config states another, that is an error. The config
    comes back with the shape there is.
    """
    model = config.model
    if model.sft_checkpoint is None:
        torch.manual_seed(config.run.seed)
        if features is None:
            return make_selector(dim, model), config
        named = model.model_copy(update={"pair_features": features.features})
        fresh = make_selector(dim, named, len(features.names))
        assert isinstance(fresh, FeatureSelector)
        values = torch.from_numpy(features.values)
        fresh.standardise(values[values.any(-1)])  # a padded pair is 0 throughout
        return fresh, config
    selector, found = load_selector(
        model.sft_checkpoint, dropout=model.dropout, attention_dropout=model.attention_dropout
    )
    if found.dim != dim:
        raise LeverError(
            f"the checkpoint takes embeddings of width {found.dim}, the embeddings have {dim}",
            where=str(model.sft_checkpoint),
        )
    if found.config.pair_features != (() if features is None else features.features):
        raise UsageError(
            "the checkpoint reads other features of pairs than the config names",
            where=str(model.sft_checkpoint),
            value=", ".join(found.config.pair_features) or "none",
            hint="--pair-features names each",
        )
    actual = {name: getattr(found.config, name) for name in SHAPE}
    for name, value in actual.items():
        if name in model.model_fields_set and getattr(model, name) != value:
            raise UsageError(
                f"the checkpoint has {name} = {value}, the config says {getattr(model, name)}",
                where=str(model.sft_checkpoint),
                hint="leave the option out: the checkpoint decides its shape",
            )
    say(f"start from {model.sft_checkpoint} ({found.layout}, {len(found.tensors)} tensors matched)")
    if found.foreign:
        say(f"not the selector's, left out: {', '.join(found.foreign)}")
    return selector, config.model_copy(update={"model": model.model_copy(update=actual)})


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


def title_of(phase: Phase, config: TrainConfig) -> str:
    """The line that opens the phase."""
    if phase.name == "sft":
        return f"[SFT] epochs={phase.epochs}, lr={config.sft.lr}, warm_up={config.sft.warm_up}"
    if phase.name == "dense":
        return f"[DENSE] epochs={phase.epochs}, lr={config.dense.lr}, {config.dense.objective}"
    if phase.name == "rce":
        low, high = config.rce.temperature_end, config.rce.temperature_start
        return f"[RCE] epochs={phase.epochs}, lr={config.rce.lr}, temperature={high} to {low}"
    grpo = config.grpo
    return f"[GRPO] epochs={phase.epochs}, lr={grpo.lr}, kl_beta_init={grpo.kl_beta_init}"
