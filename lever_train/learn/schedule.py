"""What changes from step to step: the RCE temperature, the KL weight, the warm-up, the noise.

All are pure functions of a step number (or of the last KL), so a resumed run computes the same.
"""

from __future__ import annotations

BETA_MIN, BETA_MAX = 0.001, 10.0
BETA_FACTOR = 1.5


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
    """Seed of the dropout noise of one step: no generator state needs to be kept to resume."""
    mixed = (seed * 0x9E3779B97F4A7C15 + phase * 0xBF58476D1CE4E5B9) & _MASK
    mixed = (mixed ^ (step * 0x94D049BB133111EB) ^ (rank << 48)) & _MASK
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & _MASK
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF


_MASK = 0xFFFFFFFFFFFFFFFF
