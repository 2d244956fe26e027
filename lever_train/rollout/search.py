"""Search a pool step by step: beams, samples, random and retrieved sequences, and their terms.

In go a policy's history at its start and the positions that are closed; out come positions
[B, W, S], -1 where a sequence does not exist, and the log-probabilities of given sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from lever_train.options.rollout import Recipe
from lever_train.rollout import draws
from lever_train.rollout.policy import Similarity
from lever_train.selector.model import History
from lever_train.selector.pool import Pool

DECIMALS = 6  # what is stored; float64 sums differ in the last bits from batch to batch


def beams(start: History, closed: Tensor, recipe: Recipe) -> Tensor:
    """The best sequences by log-probability [B, W, S], best first; -1 where there are no more.

    Among equals the earlier sequence and the lower position win.
    """
    B, K = closed.shape
    width = recipe.beam_width
    positions = closed.new_zeros((B, 1, 0), dtype=torch.long)
    if not width:
        return closed.new_zeros((B, 0, recipe.shot_num), dtype=torch.long)
    total = torch.zeros((B, 1), dtype=torch.float64, device=closed.device)
    taken, history = closed[:, None, :], start
    for _ in range(recipe.shot_num):
        step = history.scores().masked_fill(taken, float("-inf")).log_softmax(-1)
        total = (total[..., None] + step.nan_to_num(nan=float("-inf"))).flatten(1)
        total, best = _largest(total.round(decimals=9), width)
        parent, chosen = best // K, best % K
        positions = _grow(positions, parent, chosen)
        taken = taken.gather(1, parent[..., None].expand(-1, -1, K))
        taken = taken.scatter(2, chosen[..., None], True)
        history = history.advance(parent, chosen)
    positions = positions.masked_fill(torch.isinf(total)[..., None], -1)
    missing = width - positions.shape[1]
    return pad(positions, (0, 0, 0, missing), value=-1)


def _largest(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row, ties by the lower index: values and indices."""
    ordered = values.sort(dim=-1, descending=True, stable=True)
    return ordered.values[:, :width], ordered.indices[:, :width]


def _grow(positions: Tensor, parent: Tensor, chosen: Tensor) -> Tensor:
    before = positions.gather(1, parent[..., None].expand(-1, -1, positions.shape[-1]))
    return torch.cat([before, chosen[..., None]], dim=-1)


def samples(
    start: History, closed: Tensor, recipe: Recipe, ids: npt.NDArray[np.int64], tau: float
) -> Tensor:
    """Draws [B, W, S] at temperature ``tau``."""
    B, K = closed.shape
    W = recipe.num_samples_per_temp
    taken = closed[:, None, :].expand(B, W, K)
    parent = torch.zeros((B, W), dtype=torch.long, device=closed.device)
    history, chosen = start, []
    for t in range(recipe.shot_num):
        noise = (
            np.stack([_noise(recipe, ids, f"sample/{tau!r}/{w}/{t}", K) for w in range(W)], axis=1)
            if W
            else np.zeros((B, 0, K))
        )
        scores = history.scores() / tau + torch.from_numpy(noise).to(closed.device)
        pick = scores.masked_fill(taken, float("-inf")).argmax(-1)
        chosen.append(pick)
        taken = taken.scatter(2, pick[..., None], True)
        if t + 1 < recipe.shot_num:
            history = history.advance(parent, pick)
            parent = torch.arange(W, device=closed.device).expand(B, W)
    return torch.stack(chosen, dim=-1)


def random(closed: Tensor, recipe: Recipe, ids: npt.NDArray[np.int64]) -> Tensor:
    """Uniform draws [B, W, S] of distinct positions: the S largest of equal-weight Gumbels."""
    B, K = closed.shape
    found = [closed.new_zeros((B, 0, recipe.shot_num), dtype=torch.long)]
    for w in range(recipe.num_random):
        noise = torch.from_numpy(_noise(recipe, ids, f"random/{w}", K)).to(closed.device)
        best = noise.masked_fill(closed, float("-inf")).topk(recipe.shot_num).indices
        found.append(best[:, None, :])
    return torch.cat(found, dim=1)


def retrieval(query: Tensor, pool: Pool, closed: Tensor, recipe: Recipe) -> Tensor:
    """Windows [B, W, S] of the ranking by cosine similarity; -1 where the pool ends."""
    count, shots = recipe.num_retrieval, recipe.shot_num
    if not count:
        return closed.new_zeros((len(closed), 0, shots), dtype=torch.long)
    first = recipe.round * count
    scores = Similarity().begin(query, pool).scores()[:, 0].masked_fill(closed, float("-inf"))
    values, order = _largest(scores, first + count + shots - 1)
    order = order.masked_fill(torch.isinf(values), -1)
    order = pad(order, (0, first + count + shots - 1 - order.shape[1]), value=-1)
    windows = order[:, first:].unfold(1, shots, 1)
    return windows.masked_fill((windows < 0).any(-1, keepdim=True), -1)


def _noise(
    recipe: Recipe, ids: npt.NDArray[np.int64], stream: str, count: int
) -> npt.NDArray[np.float64]:
    return draws.gumbel(draws.keys(recipe.seed, ids, f"{stream}/{recipe.round}"), count)


@dataclass(frozen=True)
class Terms:
    """Per candidate [B, N] float64: sums over the steps."""

    score: Tensor
    log_prob: Tensor
    log_prob_at: Tensor


def replay(
    start: History, closed: Tensor, positions: Tensor, temperature: npt.NDArray[np.float64]
) -> Terms:
    """What the policy says of the sequences at ``positions`` [B, N, S], step by step."""
    B, N, S = positions.shape
    at = torch.from_numpy(np.nan_to_num(temperature, nan=1.0)).to(closed.device)[:, None]
    real = positions.clamp(min=0)
    taken = closed[:, None, :].expand(B, N, -1)
    parent = torch.zeros((B, N), dtype=torch.long, device=closed.device)
    history = start
    sums = [torch.zeros((B, N), dtype=torch.float64, device=closed.device) for _ in range(3)]
    for t in range(S if N else 0):
        pick = real[..., t : t + 1]
        scores = history.scores().expand(B, N, -1).masked_fill(taken, float("-inf"))
        log_p = scores.log_softmax(-1).gather(2, pick)[..., 0]
        log_q = (scores / at).log_softmax(-1).gather(2, pick)[..., 0]
        sums = [sums[0] + log_p.exp(), sums[1] + log_p, sums[2] + log_q]
        if t + 1 < S:
            taken = taken.scatter(2, pick, True)
            history = history.advance(parent, pick[..., 0])
            parent = torch.arange(N, device=closed.device).expand(B, N)
    return Terms(*(s.round(decimals=DECIMALS) for s in sums))
