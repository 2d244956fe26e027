"""Which reward, as plain data. A field with ``help`` is an option of the commands that reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from lever_data.errors import shorten


def _help(text: str, **more: str) -> dict[str, str]:
    return {"help": text, **more}


@dataclass(frozen=True)
class RewardSpec:
    """What a candidate is worth.

    A mode of ``lever_data.relations.rewards.modes`` with its weights, or an expression of the
    user's in its place. ``hard_weight``, ``soft_weight`` and ``rel_weight`` are
    w_h, w_s and w_r of the formulas; ``shot_weights`` are w_k, and empty means equal ones that sum
    to 1.
    """

    mode: str = field(
        default="hard_plus_soft", metadata=_help("Reward mode.", flag="--reward-mode")
    )
    expression: str | None = field(
        default=None,
        metadata=_help(
            "A SQL expression over the view's columns, in place of a mode.", flag="--reward"
        ),
    )
    hard_weight: float = field(default=1.0, metadata=_help("Weight of vqa_correct."))
    soft_weight: float = field(
        default=1.0, metadata=_help("Weight of vqa_acc_score or vqa_gt_prob.")
    )
    rel_weight: float = field(default=0.1, metadata=_help("Weight of vqa_rel_score."))
    hybrid_alpha: float = field(
        default=0.5, metadata=_help("Share of the information term in the mode hybrid, in [0, 1].")
    )
    reward_alpha: float = field(default=0.0, metadata=_help("Weight of quality in legacy."))
    reward_beta: float = field(default=0.0, metadata=_help("Weight of correctness in legacy."))
    correctness_mode: str = field(default="01", metadata=_help("01 or pm1, in legacy."))
    use_logprob: bool = field(
        default=False, metadata=_help("Quality in legacy is -log-probability.")
    )
    shot_weights: tuple[float, ...] = field(
        default=(), metadata=_help("Weights of the prefixes in multi_shot: 0.5,0.3,0.2.")
    )

    @property
    def name(self) -> str:
        """How the reward is called in reports: the mode, or the expression itself."""
        return self.expression or self.mode


def both_given(mode: str, expression: str) -> str:
    """What an error says where a reward is given both ways: neither is to win unseen."""
    return (
        f"--reward-mode (mode = {shorten(mode)}) and --reward (expression = {shorten(expression)}) "
        "exclude each other: give one of the two"
    )
