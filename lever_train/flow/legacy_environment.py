"""The legacy pipeline's environment variables as a training config.

In go variables by name; out comes a :class:`TrainConfig` with the legacy script's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

from lever_data.errors import UsageError
from lever_data.relations.reward_spec import RewardSpec
from lever_data.sources.ingest_options import Reader
from lever_train.options.train import (
    DataConfig,
    GrpoConfig,
    ModelConfig,
    RceConfig,
    RunConfig,
    TrainConfig,
)

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "")
# What the legacy script reads, at its state of the notes and at its newest.
_NEWEST = ("RCE_USE_RAW_REWARD", "REL_WEIGHT", "REQUIRE_POSITIVE_QUERY", "RL_DATA_PATH")
VARIABLES = (
    *("RCE_EPOCHS", "GRPO_EPOCHS", "BATCH_SIZE", "RCE_LR", "GRPO_LR", "KL_BETA", "NUM_LAYERS"),
    *("REWARD_MODE", "HARD_WEIGHT", "SOFT_WEIGHT", "SKIP_FALLBACK_REWARD"),
    *("RCE_USE_NORMALIZED_REWARD", "FREEZE_BACKBONE_IN_GRPO"),
    *_NEWEST,
)
# What looks like one of them: of the same words, but not read by anything here.
_LOOKS_LIKE = re.compile(
    r"(RCE|GRPO|KL|SFT|REWARD|HARD|SOFT|REL|RL|BEAM|SHOT|TOPK)_[A-Z0-9_]+|[A-Z0-9_]+_REWARD"
    r"|[A-Z0-9_]+_QUERY|NUM_[A-Z0-9_]+|BATCH_[A-Z0-9_]+|[A-Z0-9_]+_IN_GRPO"
)


def not_understood(environment: Mapping[str, str]) -> list[str]:
    """A line for every variable that is set, looks like the script's and changes nothing."""
    lines = []
    for name in sorted(environment):
        if name not in VARIABLES and _LOOKS_LIKE.fullmatch(name):
            near = get_close_matches(name, VARIABLES, n=1, cutoff=0.7)
            meant = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{name} is set and not understood: it changes nothing{meant}")
    return lines


def rl_reader(environment: Mapping[str, str]) -> Reader:
    """The state of the legacy code whose words these are: RL data is written as it reads them."""
    return "newest" if any(name in environment for name in _NEWEST) else "notes"


def train_config(environment: Mapping[str, str], device: str) -> TrainConfig:
    """The training that the legacy environment variables describe; the script's defaults.

    Raises:
        UsageError: a variable is not a number or not a truth value, or two contradict each other.
    """
    env = _Environment(environment)
    return TrainConfig(
        data=DataConfig(
            skip_fallback=env.truth("SKIP_FALLBACK_REWARD"),
            require_positive_query=env.truth("REQUIRE_POSITIVE_QUERY"),
        ),
        reward=RewardSpec(
            mode=environment.get("REWARD_MODE", "hard_plus_soft"),
            hard_weight=env.number("HARD_WEIGHT", 1),
            soft_weight=env.number("SOFT_WEIGHT", 1),
            rel_weight=env.number("REL_WEIGHT", 0.1),
        ),
        model=ModelConfig(num_layers=env.whole("NUM_LAYERS", 1)),
        rce=RceConfig(
            epochs=env.whole("RCE_EPOCHS", 5),
            lr=env.number("RCE_LR", 1e-4),
            use_normalized_reward=env.normalized(),
        ),
        grpo=GrpoConfig(
            epochs=env.whole("GRPO_EPOCHS", 0),
            lr=env.number("GRPO_LR", 5e-6),
            kl_beta_init=env.number("KL_BETA", 0.15),
            freeze_backbone=env.truth("FREEZE_BACKBONE_IN_GRPO"),
        ),
        run=RunConfig(batch_size=env.whole("BATCH_SIZE", 1), device=device),
    )


def reward_suffix(environment: Mapping[str, str]) -> str:
    """What the reward adds to the folder's name: nothing for the default one; the weights as they
    are written in the variables (LEGACY: HARD_WEIGHT=2.0 gives ``_h2.0_s1.0``)."""
    mode = environment.get("REWARD_MODE", "hard_plus_soft")
    if mode != "hard_plus_soft":
        return f"_{mode}"
    env = _Environment(environment)
    if (env.number("HARD_WEIGHT", 1), env.number("SOFT_WEIGHT", 1)) == (1, 1):
        return ""
    hard, soft = (environment.get(name, "1.0") for name in ("HARD_WEIGHT", "SOFT_WEIGHT"))
    return f"_h{hard}_s{soft}"


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

    def normalized(self) -> bool:
        """Whether RCE weighs by z-scores: two variables say it, each the contrary of the other."""
        if "RCE_USE_RAW_REWARD" not in self.values:
            return self.truth("RCE_USE_NORMALIZED_REWARD")
        found = not self.truth("RCE_USE_RAW_REWARD")
        other = self.values.get("RCE_USE_NORMALIZED_REWARD")
        if other is not None and self.truth("RCE_USE_NORMALIZED_REWARD") != found:
            raise UsageError(
                "RCE_USE_RAW_REWARD and RCE_USE_NORMALIZED_REWARD contradict each other",
                value=f"{self.values['RCE_USE_RAW_REWARD']} and {other}",
                hint="set one of them",
            )
        return found

    def truth(self, name: str) -> bool:
        text = self.values.get(name, "").lower()
        if text not in _TRUE + _FALSE:
            raise UsageError(f"{name} is neither true nor false", value=text)
        return text in _TRUE
