"""Two operations the selector spends its time on, written for few passes over memory.

``picked_scores`` compares each query with its own candidates and scatters gradients back to the
distinct examples; ``dropout`` draws its noise sixteen bits at a time. Figures in docs/lab.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LEVELS = 1 << 16


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


def picked_scores(query: Tensor, units: Tensor, index: Tensor) -> Tensor:
    """Dot products [B, K] of queries [B, h] with ``units`` [U, h] at ``index`` [B, K]."""
    found: Tensor = _PickedScores.apply(query, units, index)  # type: ignore[no-untyped-call]
    return found


class _PickedScores(torch.autograd.Function):
    """The gradient of an example is a weighted sum of queries: a bag of rows of ``query``, with
    one bag per example, so nothing of size [B, K, h] is written in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, units: Tensor, index: Tensor) -> Tensor:
        picked = functional.embedding(index, units)
        ctx.save_for_backward(query, picked, index)
        ctx.num_units = units.shape[0]
        return (query[:, None, :] @ picked.transpose(1, 2)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, picked, index = ctx.saved_tensors
        for_query = (gradient[:, None, :] @ picked).squeeze(1)
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=ctx.num_units)
        for_units = functional.embedding_bag(
            torch.div(order, index.shape[1], rounding_mode="floor"),
            query,
            offsets=counts.cumsum(0) - counts,
            per_sample_weights=gradient.flatten()[order],
            mode="sum",
        )
        return for_query, for_units, None
