"""Which reward: the options of every command that rewards, as a section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from lever_data.catalog import reward_modes
from lever_data.errors import shorten
from lever_data.options import Section, Share, option


class RewardSpec(Section):
    """What a candidate is worth.

    A mode (a file ``sql/macros/reward_<mode>.sql``) with its weights, or an expression of the
    user's in its place. ``hard_weight``, ``soft_weight`` and ``rel_weight`` are
    w_h, w_s and w_r of the formulas; ``shot_weights`` are w_k, and empty means equal ones that sum
    to 1.
    """

    mode: str = option(
        "hard_plus_soft", f"One of {', '.join(reward_modes())}.", "--reward-mode", everyday=True
    )
    expression: str | None = option(
        None,
        "A SQL expression over the view's columns in place of a mode: give one of the two. "
        "Either, given as a flag, replaces what a file says.",
        "--reward",
        everyday=True,
    )
    hard_weight: float = option(1.0, "Weight of the column correct.")
    soft_weight: float = option(1.0, "Weight of the column score or expected_score.")
    rel_weight: float = option(0.1, "Weight of the column similarity.")
    hybrid_alpha: Share = option(0.5, "Share of the information term in the mode hybrid.")
    reward_alpha: float = option(0.0, "Weight of quality in the mode legacy.")
    reward_beta: float = option(0.0, "Weight of correctness in the mode legacy.")
    correctness_mode: Literal["01", "pm1"] = option(
        "01", "Scale of correctness in the mode legacy."
    )
    use_logprob: bool = option(False, "Quality is -logprob_score in the mode legacy.")
    shot_weights: tuple[float, ...] = option(
        (), "Weights w_k of the mode multi_shot, such as 0.5,0.3,0.2; equal if not given."
    )

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        if self.expression is not None and "mode" in self.model_fields_set:
            raise ValueError(
                f"--reward-mode (mode = {shorten(self.mode)}) and --reward (expression = "
                f"{shorten(self.expression)}) exclude each other: give one of the two"
            )
        return self

    @property
    def name(self) -> str:
        """How the reward is called in reports: the mode, or the expression itself."""
        return self.expression or self.mode
