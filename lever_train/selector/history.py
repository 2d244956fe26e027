"""The history-aware selector: a GRU carries what was chosen, with an embedding of the step.

State u_0 is the query after attention. Step t scores the pool with W_q (u_t + e_t), e_t the
embedding of the step; after choosing c the state becomes u_{t+1} = GRU(W_in c, u_t). Step scores
depend on the prefix, so log-probabilities are computed step by step for every candidate: a dense
[B, N, K] softmax per step, which is the price of a memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.selector.closed_form import CHOSEN, Steps
from lever_train.selector.model import History, Selector, SelectorConfig, cosine_scores
from lever_train.selector.pool import Pool


class GruSelector(Selector):
    """The static selector plus ``history.*`` (a GRU cell) and ``step_embedding.weight``."""

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__(config)
        self.history = nn.GRUCell(config.hidden, config.hidden)
        self.step_embedding = nn.Embedding(config.max_shots, config.hidden)
        nn.init.zeros_(self.step_embedding.weight)

    def scores(
        self, query: Tensor, candidates: Tensor | Pool, pool_mask: Tensor | None = None
    ) -> Tensor:
        """Scores of the first step, [B, K]; see :meth:`Selector.scores`."""
        return self.begin(query, Pool.of(candidates, pool_mask)).scores()[:, 0]

    def steps(self, query: Tensor, pool: Pool, positions: Tensor, step_mask: Tensor) -> Steps:
        """Terms of every step, teacher-forced; see :meth:`Selector.steps`."""
        B, N, S = positions.shape
        history: History = self.begin(query, pool)
        chosen = torch.zeros(B, N, pool.size, dtype=torch.bool, device=query.device)
        parent = torch.zeros(B, N, dtype=torch.long, device=query.device)
        terms: list[tuple[Tensor, Tensor]] = []
        for t in range(S):
            logits = history.scores().float().expand(-1, N, -1).masked_fill(chosen, CHOSEN)
            terms.append(_step_terms(logits, positions[:, :, t], pool.mask))
            if t + 1 < S:
                chosen = chosen.scatter(2, positions[:, :, t : t + 1], True)
                history = history.advance(parent, positions[:, :, t])
                parent = torch.arange(N, device=query.device).expand(B, N)
        log_prob, mean_nll = (torch.stack(part, dim=-1) for part in zip(*terms, strict=True))
        return Steps(torch.where(step_mask, log_prob, 0.0), torch.where(step_mask, mean_nll, 0.0))

    def begin(self, query: Tensor, pool: Pool) -> History:
        """Start choosing; see :meth:`Selector.begin`."""
        state = self.attend(query, pool)
        return GruHistory(self, pool, self.units(pool), state[:, None, :], 0)

    def step_scores(self, state: Tensor, units: Tensor, pool: Pool, step: int) -> Tensor:
        """Scores [B, W, K] of the states [B, W, h] at ``step``."""
        if step >= self.config.max_shots:
            raise LeverError(
                f"this gru selector knows {self.config.max_shots} steps",
                value=step + 1,
                hint="train one with a larger --max-shots",
            )
        unit = self.head(state + self.step_embedding.weight[step])
        return cosine_scores(unit, units, pool)

    def remember(self, state: Tensor, chosen: Tensor) -> Tensor:
        """States [B, W, h] after choosing the raw embeddings [B, W, d]."""
        B, W, h = state.shape
        weight = self._input_weight()
        inputs = chosen if weight is None else chosen @ weight.T
        updated: Tensor = self.history(inputs.reshape(B * W, h), state.reshape(B * W, h))
        return updated.view(B, W, h)


class GruHistory(History):
    """W states [B, W, h] for each query, all at the same step."""

    def __init__(
        self, selector: GruSelector, pool: Pool, units: Tensor, state: Tensor, step: int
    ) -> None:
        self._selector, self._pool, self._units = selector, pool, units
        self._state, self._step = state, step

    def scores(self) -> Tensor:
        """Scores of the next step, [B, W, K]."""
        return self._selector.step_scores(self._state, self._units, self._pool, self._step)

    def advance(self, parent: Tensor, chosen: Tensor) -> History:
        """Extend sequence ``parent`` [B, W'] by position ``chosen`` [B, W']."""
        index = parent[..., None].expand(-1, -1, self._state.shape[-1])
        state = self._selector.remember(self._state.gather(1, index), self._pool.at(chosen))
        return GruHistory(self._selector, self._pool, self._units, state, self._step + 1)


def make_selector(config: SelectorConfig) -> Selector:
    """A freshly initialised selector of the configured kind, from torch's global generator."""
    return GruSelector(config) if config.kind == "gru" else Selector(config)


def _step_terms(logits: Tensor, target: Tensor, pool_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of ``target`` [B, N] and the pool's mean -log p, both [B, N]."""
    if pool_mask is None:
        log_p = functional.log_softmax(logits, dim=-1)
        return log_p.gather(2, target[..., None]).squeeze(2), -log_p.mean(-1)
    real = pool_mask[:, None, :]
    log_p = functional.log_softmax(logits.masked_fill(~real, float("-inf")), dim=-1)
    total = log_p.masked_fill(~real, 0.0).sum(-1)
    return log_p.gather(2, target[..., None]).squeeze(2), -total / real.sum(-1)
