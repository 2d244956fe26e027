"""The selectors that carry a state of what they chose, and :func:`make_selector` for any kind.

In go the options of a selector; out comes one that answers to the interface of ``model.Selector``.
Step scores depend on the prefix, so log-probabilities are computed step by step for every
candidate, which is the price of a memory.

``gru`` is lever's own, and ``features`` has a file of its own. The others are the legacy ones, with
the tensor names of their checkpoints. All start from the unit query u and the unit candidates c of
the static selector; step t scores with u_t = unit(u + e_t), e_t a step embedding, and after
choosing c:

- ``gated`` (V4-1): u ← unit(g u + (1 - g) c), g = σ(W_g [u; c] + b_g); no step embedding.
- ``decoder`` (V4-2): u ← unit(GRU(c, u)).
- ``mmr`` (V4-3): ``decoder``; from the second step on softplus(λ_t) · max cos(c, chosen) is taken
  off the scores.
- ``additive``, ``bilinear`` (V4-5): ``decoder``; the cosine gives way to vᵀ tanh(W_q u_t + W_c c)
  or to u_tᵀ W c, divided by 0.1 as well.
- ``stop`` (V4-10): ``decoder``; a learned unit vector stands behind the pool, and choosing it ends
  the pointer. Without GRU u ← unit(0.6 u + 0.4 c).

Source: the legacy models of 2025-12-26 to 12-29 and their plan
``PointerSelector_Upgrade_Plans_Keep_RCE_GRPO.md``. One difference in training: the legacy models
from V4-2 on drop out before the projections, these after, as V2 does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.options.train import ModelConfig
from lever_train.selector.features import FeatureSelector
from lever_train.selector.model import (
    SCORE_TEMPERATURE,
    AttentionSelector,
    History,
    Pool,
    Selector,
    StaticSelector,
    drawn,
)

STEP_NOISE = 0.02  # std of step embeddings and the stop token at initialisation (legacy)
DIVERSITY = 0.1  # λ at initialisation (legacy), a weight of softplus(0.1) = 0.74
KEPT = 0.6  # share of the query that a stop selector without GRU keeps (legacy)


def make_selector(dim: int, config: ModelConfig, num_features: int = 0) -> Selector:
    """A freshly initialised selector, from torch's global generator.

    ``dim``: width of the embeddings. ``num_features``: of every pair, for the kind ``features``.
    """
    if config.selector == "features":
        return FeatureSelector(dim, config, num_features)
    if config.selector == "static":
        return StaticSelector(dim, config)
    return GruSelector(dim, config) if config.selector == "gru" else LegacyDecoder(dim, config)


class Remembering(AttentionSelector):
    """A selector with a state [B, W, h] per partial sequence; subclasses say how it moves."""

    def begin(self, query: Float[Tensor, "B d"], pool: Pool) -> History:
        """Start choosing; see :meth:`Selector.begin`."""
        state = self.start(query, pool)[:, None, :]
        return Memory(self, pool, pool.spread(self.units(pool)), state)

    def start(self, query: Float[Tensor, "B d"], pool: Pool) -> Float[Tensor, "B h"]:
        """The state before the first step."""
        raise NotImplementedError

    def step_scores(self, memory: Memory) -> Float[Tensor, "B W K"]:
        """Scores of the next step."""
        raise NotImplementedError

    def remember(
        self, memory: Memory, state: Float[Tensor, "B V h"], chosen: Int[Tensor, "B V"]
    ) -> Float[Tensor, "B V h"]:
        """The states after choosing pool positions."""
        raise NotImplementedError

    def _require_step(self, step: int) -> None:
        if step >= self.config.max_shots:
            raise LeverError(
                f"this {self.config.selector} selector knows {self.config.max_shots} steps",
                value=step + 1,
                hint="ask for fewer shots, or train one with a larger --max-shots",
            )


class Memory(History):
    """W states [B, W, h] for each query, all at the same step.

    ``units``: unit vectors of the pool's positions, [B, K, h] or, of a shared pool, [K, h].
    ``redundancy`` [B, W, K]: highest cosine of each candidate with what was chosen; ``None``
    before the first choice and where nobody reads it.
    """

    def __init__(
        self, selector: Remembering, pool: Pool, units: Tensor, state: Float[Tensor, "B W h"]
    ) -> None:
        self.selector, self.pool, self.units, self.state = selector, pool, units, state
        self.step = 0
        self.redundancy: Tensor | None = None
        self.stops = selector.config.ends_pointers

    def scores(self) -> Float[Tensor, "B W K"]:
        """Scores of the next step."""
        return self.selector.step_scores(self)

    def advance(self, parent: Int[Tensor, "B V"], chosen: Int[Tensor, "B V"]) -> History:
        """Extend sequence ``parent`` by position ``chosen``."""
        kept = _rows(self.state, parent)
        state = self.selector.remember(self, kept, chosen)
        later = Memory(self.selector, self.pool, self.units, state)
        later.step = self.step + 1
        if self.selector.config.selector == "mmr":
            near = _rows(self.units, chosen) @ self.units.transpose(-1, -2)
            later.redundancy = near
            if self.redundancy is not None:
                later.redundancy = torch.maximum(near, _rows(self.redundancy, parent))
        return later


class GruSelector(Remembering):
    """State u_0 is the query after attention; step t scores with W_q (u_t + e_t); after choosing c
    the state becomes u_{t+1} = GRU(W_in c, u_t)."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__(dim, config)
        self.history = nn.GRUCell(config.hidden, config.hidden)
        size = config.max_shots, config.hidden
        self.step_embedding = nn.Embedding(*size, _weight=drawn(*size))
        nn.init.zeros_(self.step_embedding.weight)

    def start(self, query: Float[Tensor, "B d"], pool: Pool) -> Float[Tensor, "B h"]:
        """The query after attention."""
        return self.attend(query, pool)

    def step_scores(self, memory: Memory) -> Float[Tensor, "B W K"]:
        """Cosines with W_q (u_t + e_t), divided by 0.1."""
        self._require_step(memory.step)
        unit = self.head(memory.state + self.step_embedding.weight[memory.step])
        return _cosines(unit, memory.units)

    def remember(
        self, memory: Memory, state: Float[Tensor, "B V h"], chosen: Int[Tensor, "B V"]
    ) -> Float[Tensor, "B V h"]:
        """GRU(W_in c, u)."""
        weight, raw = self._input_weight(), memory.pool.at(chosen)
        return _cell(self.history, raw if weight is None else raw @ weight.T, state)


class LegacyDecoder(Remembering):
    """The legacy selectors from V4-1 on; formulas at the top of this file."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__(dim, config)
        kind, h, steps = config.selector, config.hidden, config.max_shots
        if kind == "gated":
            self.query_update_gate = nn.Linear(2 * h, h)
            return
        if config.decoder_gru:
            self.decoder_gru = nn.GRUCell(h, h)
        if config.step_embedding:
            self.step_emb = nn.Embedding(steps, h, _weight=drawn(steps, h))
            self.step_emb.weight.data.copy_(drawn(steps, h, std=STEP_NOISE))
        if kind == "mmr":
            self.div_lambda = nn.Parameter(torch.full((steps,), DIVERSITY))
        elif kind == "additive":
            self.attn_Wq, self.attn_Wc = nn.Linear(h, h), nn.Linear(h, h, bias=False)
            self.attn_v = nn.Linear(h, 1, bias=False)
            for layer in (self.attn_Wq, self.attn_Wc, self.attn_v):
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(self.attn_Wq.bias)
            self.attn_v.weight.data.mul_(0.1)  # scores as small as cosines at the start
        elif kind == "bilinear":
            self.bilinear = nn.Bilinear(h, h, 1, bias=False)
            nn.init.xavier_uniform_(self.bilinear.weight)
        elif kind == "stop":
            self.stop_token = nn.Parameter(drawn(1, h, std=STEP_NOISE))

    def begin(self, query: Float[Tensor, "B d"], pool: Pool) -> History:
        """Start choosing; the stop token stands behind the pool."""
        memory = super().begin(query, pool)
        assert isinstance(memory, Memory)
        if memory.stops:
            stop = functional.normalize(self.stop_token, dim=-1).to(memory.units.dtype)
            stop = stop.expand(*memory.units.shape[:-2], 1, -1)
            memory.units = torch.cat([memory.units, stop], dim=-2)
        return memory

    def start(self, query: Float[Tensor, "B d"], pool: Pool) -> Float[Tensor, "B h"]:
        """The unit query of the static selector."""
        return self.head(self.attend(query, pool))

    def step_scores(self, memory: Memory) -> Float[Tensor, "B W K"]:
        """Scores of the kind, divided by 0.1, less what MMR takes off."""
        state, units = memory.state, memory.units
        if hasattr(self, "step_emb"):
            self._require_step(memory.step)
            state = functional.normalize(state + self.step_emb.weight[memory.step], dim=-1)
        if self.config.selector == "additive":
            pairs = self.attn_Wq(state)[:, :, None, :] + self.attn_Wc(units).unsqueeze(-3)
            found: Tensor = self.attn_v(pairs.tanh()).squeeze(-1).to(units.dtype)
            return found / SCORE_TEMPERATURE
        if self.config.selector == "bilinear":
            state = state @ self.bilinear.weight[0]
        scores = _cosines(state, units)
        if memory.redundancy is not None:
            self._require_step(memory.step)
            weight = functional.softplus(self.div_lambda[memory.step])
            scores = scores - weight * memory.redundancy
        return scores

    def remember(
        self, memory: Memory, state: Float[Tensor, "B V h"], chosen: Int[Tensor, "B V"]
    ) -> Float[Tensor, "B V h"]:
        """The unit query after a choice."""
        unit = _rows(memory.units, chosen)
        if self.config.selector == "gated":
            gate = self.query_update_gate(torch.cat([state, unit], dim=-1)).sigmoid()
            state = gate * state + (1 - gate) * unit
        elif hasattr(self, "decoder_gru"):
            state = _cell(self.decoder_gru, unit, state)
        elif self.config.selector == "stop":
            state = KEPT * state + (1 - KEPT) * unit
        return functional.normalize(state, dim=-1)


def _rows(values: Tensor, at: Int[Tensor, "B V"]) -> Tensor:
    """Rows ``at`` of [B, K, h] (or of [K, h], shared) values: [B, V, h]."""
    if values.dim() == 2:
        return functional.embedding(at, values)
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))


def _cosines(state: Float[Tensor, "B W h"], units: Tensor) -> Float[Tensor, "B W K"]:
    """Products with the units [B, K, h] or [K, h], divided by 0.1, not in half precision."""
    if torch.bfloat16 in (state.dtype, units.dtype):
        state, units = state.float(), units.float()
    return state @ units.transpose(-1, -2) / SCORE_TEMPERATURE


def _cell(
    cell: nn.GRUCell, inputs: Float[Tensor, "B V h"], state: Float[Tensor, "B V h"]
) -> Float[Tensor, "B V h"]:
    updated: Tensor = cell(inputs.flatten(0, 1), state.flatten(0, 1))
    return updated.view(state.shape)
