"""The legacy pipeline's environment variables as a training config.

In go variables by name; out comes a :class:`TrainConfig` with the legacy script's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping

from lever_data.errors import UsageError
from lever_data.relations.reward_spec import RewardSpec
from lever_train.options.train import (
    DataConfig,
    GrpoConfig,
    ModelConfig,
    RceConfig,
    RunConfig,
    TrainConfig,
)

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "")


def train_config(environment: Mapping[str, str], device: str) -> TrainConfig:
    """The training that the legacy environment variables describe; the script's defaults.

    Raises:
        UsageError: a variable is no number or no truth value.
    """
    env = _Environment(environment)
    return TrainConfig(
        data=DataConfig(skip_fallback=env.truth("SKIP_FALLBACK_REWARD")),
        reward=RewardSpec(
            mode=environment.get("REWARD_MODE", "hard_plus_soft"),
            hard_weight=env.number("HARD_WEIGHT", 1),
            soft_weight=env.number("SOFT_WEIGHT", 1),
        ),
        model=ModelConfig(num_layers=env.whole("NUM_LAYERS", 1)),
        rce=RceConfig(
            epochs=env.whole("RCE_EPOCHS", 5),
            lr=env.number("RCE_LR", 1e-4),
            use_normalized_reward=env.truth("RCE_USE_NORMALIZED_REWARD"),
        ),
        grpo=GrpoConfig(
            epochs=env.whole("GRPO_EPOCHS", 0),
            lr=env.number("GRPO_LR", 5e-6),
            kl_beta_init=env.number("KL_BETA", 0.15),
            freeze_backbone=env.truth("FREEZE_BACKBONE_IN_GRPO"),
        ),
        run=RunConfig(batch_size=env.whole("BATCH_SIZE", 1), device=device),
    )


class _Environment:
    """Typed reading of environment variables."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def number(self, name: str, default: float) -> float:
        text = self.values.get(name)
        if text is None:
            return default
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"{name} is not a number", value=text) from None

    def whole(self, name: str, default: int) -> int:
        value = self.number(name, default)
        if value != int(value):
            raise UsageError(f"{name} is not a whole number", value=value)
        return int(value)

    def truth(self, name: str) -> bool:
        text = self.values.get(name, "").lower()
        if text not in _TRUE + _FALSE:
            raise UsageError(f"{name} is neither true nor false", value=text)
        return text in _TRUE
