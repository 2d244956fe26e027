"""Picks of any selector: greedy, beam search, and sampling without replacement.

In go a selector, queries [B, d] and their pool; out come pool positions [B, W, S] with their
log-probabilities [B, W]. Ties are broken by the lower pool position, so results do not depend on
the device's sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lever_data.errors import LeverError
from lever_train.selector.model import History, Selector
from lever_train.selector.pool import Pool


@dataclass(frozen=True)
class Picks:
    """W ordered pointers for each of B queries.

    ``positions`` [B, W, S] int64 into the pool; ``log_prob`` [B, W], sum of the steps'
    log-probabilities (nats, at the temperature of the draw); ``score`` [B, W], sum of the steps'
    probabilities, the legacy ``beam_score``.
    """

    positions: Tensor
    log_prob: Tensor
    score: Tensor


@torch.no_grad()
def greedy(selector: Selector, query: Tensor, pool: Pool, shots: int) -> Picks:
    """The most probable position at every step, W = 1."""
    return beam(selector, query, pool, shots, width=1)


@torch.no_grad()
def beam(selector: Selector, query: Tensor, pool: Pool, shots: int, width: int) -> Picks:
    """Beam search: the ``width`` best sequences by log-probability, best first.

    Fewer than ``width`` come back where the pool allows no more (W = the number that exist).
    """
    partial = _Partial.start(selector, query, pool, shots)
    for _ in range(shots):
        log_p = partial.log_probs(1.0)
        K = log_p.shape[-1]
        total = (partial.log_prob[..., None] + log_p).flatten(1)
        keep = min(width, int(torch.isfinite(total).sum(-1).min()))
        # a stable sort: among equals the earlier sequence and the lower position win
        best = total.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
        partial = partial.extend(best // K, best % K, log_p)
    return partial.picks()


@torch.no_grad()
def sample(
    selector: Selector,
    query: Tensor,
    pool: Pool,
    shots: int,
    *,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Picks:
    """Draw ``count`` sequences a query, each without replacement within itself.

    ``log_prob`` is the log-probability under the softmax of scores / ``temperature``.
    """
    if temperature <= 0:
        raise LeverError("a sampling temperature must be above 0", value=temperature)
    partial = _Partial.start(selector, query, pool, shots)
    for step in range(shots):
        log_p = partial.log_probs(temperature)
        B, W, K = log_p.shape
        draws = count if step == 0 else 1
        chosen = torch.multinomial(
            log_p.exp().view(B * W, K), draws, replacement=True, generator=generator
        )
        parent = torch.arange(W, device=query.device).repeat_interleave(draws).expand(B, -1)
        partial = partial.extend(parent, chosen.view(B, W * draws), log_p)
    return partial.picks()


@dataclass(frozen=True)
class _Partial:
    """Sequences so far, and what the selector remembers of them."""

    history: History
    chosen: Tensor  # [B, W, K] bool: not to be picked (chosen before, or padding)
    positions: Tensor  # [B, W, t]
    log_prob: Tensor  # [B, W]
    score: Tensor  # [B, W]

    @classmethod
    def start(cls, selector: Selector, query: Tensor, pool: Pool, shots: int) -> _Partial:
        B = query.shape[0]
        sizes = torch.full((B,), pool.size) if pool.mask is None else pool.mask.sum(-1).cpu()
        if shots < 1 or int(sizes.min()) < shots:
            raise LeverError(
                f"{shots} demonstrations cannot be picked from this pool", value=int(sizes.min())
            )
        closed = torch.zeros(B, 1, pool.size, dtype=torch.bool, device=query.device)
        if pool.mask is not None:
            closed = ~pool.mask[:, None, :]
        nothing = torch.zeros(B, 1, device=query.device)
        empty = torch.zeros(B, 1, 0, dtype=torch.long, device=query.device)
        return cls(selector.begin(query, pool), closed, empty, nothing, nothing)

    def log_probs(self, temperature: float) -> Tensor:
        """Log-probabilities of the next step, [B, W, K]; -inf where closed."""
        scores = self.history.scores().float() / temperature
        return scores.masked_fill(self.chosen, float("-inf")).log_softmax(-1)

    def extend(self, parent: Tensor, chosen: Tensor, log_p: Tensor) -> _Partial:
        """Sequence ``parent`` [B, W'] of each query grown by position ``chosen`` [B, W']."""
        K = log_p.shape[-1]
        step = log_p.flatten(1).gather(1, parent * K + chosen)
        closed = self.chosen.gather(1, parent[..., None].expand(-1, -1, K))
        before = self.positions.gather(
            1, parent[..., None].expand(-1, -1, self.positions.shape[-1])
        )
        return _Partial(
            self.history.advance(parent, chosen),
            closed.scatter(2, chosen[..., None], True),
            torch.cat([before, chosen[..., None]], dim=-1),
            self.log_prob.gather(1, parent) + step,
            self.score.gather(1, parent) + step.exp(),
        )

    def picks(self) -> Picks:
        return Picks(self.positions, self.log_prob, self.score)
