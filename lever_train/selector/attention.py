"""Attention over pools, and the operations it is made of, written for few passes over memory.

A pool of its own for each query means reading B·K rows of vectors; gathered at once they leave
every cache (67 MB at B 512, K 64, d 512). Here they are gathered a few queries at a time, and
gradients are computed the same way instead of being kept. Figures in docs/lab.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lever_train.options.train import ModelConfig

if TYPE_CHECKING:
    from lever_train.selector.model import Pool

_LEVELS = 1 << 16
_CACHE = 1 << 22  # bytes of vectors gathered at once on a CPU
_ROWS = 1024  # rows projected at once on a CPU


def dropout(values: Tensor, p: float, training: bool) -> Tensor:
    """``torch.nn.functional.dropout`` with p rounded to 1/65536.

    Four draws come out of one 64-bit random number, which makes the noise 7 times cheaper on a
    CPU than one Bernoulli draw an element.
    """
    drop = round(p * _LEVELS)
    if not training or drop == 0:
        return values
    count = values.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=values.device)
    bits.random_(-(2**63), None)  # None: the full 64 bits
    kept = bits.view(torch.int16)[:count].view(values.shape) >= drop - _LEVELS // 2
    return values * kept.to(values.dtype).mul_(_LEVELS / (_LEVELS - drop))


def unit_rows(
    vectors: Float[Tensor, "U d"], weight: Float[Tensor, "h d"], drop: float
) -> Float[Tensor, "U h"]:
    """Rows of ``vectors`` projected by ``weight``, with dropout, of length 1.

    Projection, noise and normalisation are done for some rows at a time, in the cache. The
    gradient goes to ``weight`` alone.
    """
    found: Tensor = _UnitRows.apply(vectors, weight, drop)  # type: ignore[no-untyped-call]
    return found


def picked_dots(
    query: Float[Tensor, "B n d"], rows: Float[Tensor, "U d"], index: Int[Tensor, "B K"]
) -> Float[Tensor, "B n K"]:
    """Dot products of queries with the rows at ``index``, a few queries at a time."""
    query = query.to(rows.dtype)  # under autocast either may be in half precision
    width, parts = index.shape[1], []
    room: Tensor | None = None  # for all parts: fresh memory each time takes twice the time
    is_kept = torch.is_grad_enabled() and query.requires_grad  # a gradient reads each part again
    for at in _slices(index, rows):
        flat = index[at].flatten()
        if room is None or is_kept:
            room = rows.new_empty(len(flat), rows.shape[1])
        room = room[: len(flat)]
        torch.index_select(rows, 0, flat, out=room)
        parts.append(query[at] @ room.view(-1, width, rows.shape[1]).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def picked_scores(
    query: Float[Tensor, "B h"], units: Float[Tensor, "U h"], index: Int[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Dot products of queries with the rows of ``units`` at ``index``."""
    found: Tensor = _Dot.apply(query[:, None, :], units, index)  # type: ignore[no-untyped-call]
    return found.squeeze(1)


def picked_attention(
    query: Float[Tensor, "B n d"],
    vectors: Float[Tensor, "U d"],
    index: Int[Tensor, "B K"],
    mask: Bool[Tensor, "B K"] | None,
    drop: float,
) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B n 1"]]:
    """Softmax attention of queries over the rows of ``vectors`` at ``index``.

    ``mask`` is False at padding; ``drop`` is the dropout of the weights, 0 to leave it out.
    Returns the context and the sum of the weights, which dropout moves off 1.
    """
    logits: Tensor = _Dot.apply(query, vectors, index)  # type: ignore[no-untyped-call]
    weights = attention_weights(logits, mask, drop)
    context: Tensor = _Sum.apply(weights, vectors, index)  # type: ignore[no-untyped-call]
    return context, weights.sum(-1, keepdim=True)


def attention_weights(
    logits: Float[Tensor, "B n K"], mask: Bool[Tensor, "B K"] | None, drop: float
) -> Float[Tensor, "B n K"]:
    """Softmax over the real positions, with dropout."""
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :], float("-inf"))
    return dropout(logits.softmax(-1), drop, drop > 0)


class FoldedAttention(nn.Module):
    """``nn.MultiheadAttention`` of one query over a pool, with the projections folded.

    q·(W_k c + b_k) = (W_kᵀ q)·c + const, and the softmax does not see the constant, so keys are
    never projected; Σ a (W_v c + b_v) = W_v (Σ a c) + b_v Σ a, so neither are values. Both are
    folded through the input projection, so attention reads the raw embeddings once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden
        self.heads = config.num_heads
        self.dropout = config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * h, h))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * h))
        self.out_proj = nn.Linear(h, h)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "B h"],
        pool: Pool,
        input_weight: Float[Tensor, "h d"] | None,
    ) -> Float[Tensor, "B h"]:
        """Attention of queries over their pools' raw embeddings.

        ``input_weight`` is what the keys would be projected with first; ``None``: identity.
        """
        h, heads = query.shape[-1], self.heads
        w_q, w_k, w_v = self.in_proj_weight.view(3, h, h)
        b_q, _, b_v = self.in_proj_bias.view(3, h)
        split = (query @ w_q.T + b_q).view(-1, heads, h // heads)
        folded = torch.einsum("bne,neh->bnh", split, w_k.view(heads, h // heads, h))
        raw = folded if input_weight is None else folded @ input_weight
        context, share = self._attend(raw / math.sqrt(h // heads), pool)
        if input_weight is not None:
            context = context @ input_weight.T
        values = torch.einsum("bnh,neh->bne", context, w_v.view(heads, h // heads, h))
        values = values + share * b_v.view(heads, h // heads)
        out: Tensor = self.out_proj(values.reshape(-1, h))
        return out

    def _attend(
        self, query: Float[Tensor, "B heads d"], pool: Pool
    ) -> tuple[Float[Tensor, "B heads d"], Float[Tensor, "B heads 1"]]:
        """Context and the sum of its weights, which dropout moves off 1."""
        drop = self.dropout if self.training else 0.0
        query = query.to(pool.vectors.dtype)
        if pool.index is not None:
            return picked_attention(query, pool.vectors, pool.index, pool.mask, drop)
        weights = attention_weights(query @ pool.vectors.T, pool.mask, drop)
        return weights @ pool.vectors, weights.sum(-1, keepdim=True)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weight: Tensor, drop: float) -> Tensor:
        units = torch.empty(len(vectors), len(weight), dtype=weight.dtype, device=weight.device)
        inverse = units.new_empty(len(vectors), 1)
        noise = torch.empty_like(units) if drop > 0 else None
        for at in _row_slices(vectors):
            projected = vectors[at] @ weight.T
            if noise is not None:
                noise[at] = dropout(torch.ones_like(projected), drop, True)
                projected *= noise[at]
            length = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
            inverse[at] = length.clamp_(min=1e-12).reciprocal_()
            torch.mul(projected, inverse[at], out=units[at])
        ctx.save_for_backward(vectors, units, inverse, noise)
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        vectors, units, inverse, noise = ctx.saved_tensors
        for_weight = gradient.new_zeros(units.shape[1], vectors.shape[1])
        for at in _row_slices(vectors):
            along = (gradient[at] * units[at]).sum(1, keepdim=True)
            across = torch.addcmul(gradient[at], units[at], along, value=-1).mul_(inverse[at])
            if noise is not None:
                across *= noise[at]
            for_weight.addmm_(across.T, vectors[at])
        return None, for_weight, None


class _Dot(torch.autograd.Function):
    """[B, n, d] · rows of [U, d] at [B, K] → [B, n, K].

    The gradient of a row is a weighted sum of queries: a bag of rows of the query, with one bag
    per row, so nothing of size [B, K, d] is written in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(query, rows, index)
        return picked_dots(query, rows, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        query, rows, index = ctx.saved_tensors
        for_rows = None
        if ctx.needs_input_grad[1]:
            for_rows = _scatter(gradient, query, index, rows.shape[0])
        return _sum(gradient, rows, index), for_rows, None


class _Sum(torch.autograd.Function):
    """Weights [B, n, K] times rows of [U, d] at [B, K] → [B, n, d]; the rows get no gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index)
        return _sum(weights, rows, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, index = ctx.saved_tensors
        return picked_dots(gradient, rows, index), None, None


def _sum(weights: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    weights = weights.to(rows.dtype)
    if weights.shape[1] == 1:  # a bag reads the rows without copying them
        weighted = weights.squeeze(1).contiguous()
        return functional.embedding_bag(index, rows, per_sample_weights=weighted, mode="sum")[
            :, None, :
        ]
    parts = [weights[at] @ functional.embedding(index[at], rows) for at in _slices(index, rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter(gradient: Tensor, query: Tensor, index: Tensor, size: int) -> Tensor:
    """Σ over (b, k) with index[b, k] = u of gradient[b, :, k] · query[b], as [size, d]."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=size)
    owner = torch.div(order, index.shape[1], rounding_mode="floor")
    total: Tensor | None = None
    for n in range(query.shape[1]):
        bags = functional.embedding_bag(
            owner,
            query[:, n].contiguous(),
            offsets=counts.cumsum(0) - counts,
            per_sample_weights=gradient[:, n].flatten()[order].to(query.dtype),
            mode="sum",
        )
        total = bags if total is None else total + bags
    if total is None:
        raise AssertionError("a query without rows")
    return total


def _row_slices(vectors: Tensor) -> list[slice]:
    size = _ROWS if vectors.device.type == "cpu" else max(len(vectors), 1)
    return [slice(first, first + size) for first in range(0, len(vectors), size)]


def _slices(index: Tensor, rows: Tensor) -> list[slice]:
    """Queries to gather for at once: as many as fit the cache; all of them on a GPU."""
    size = len(index)
    if rows.device.type == "cpu":
        size = max(1, _CACHE // (index.shape[1] * rows.shape[1] * rows.element_size()))
    return [slice(first, first + size) for first in range(0, max(len(index), 1), size)]
