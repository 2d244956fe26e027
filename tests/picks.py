"""What production picks with a selector: the search of rollouts and evaluations, for tests."""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor

from lever_train.options.rollout import Recipe
from lever_train.rollout.policy import SelectorPolicy
from lever_train.rollout.propose import Ask, Proposals, propose
from lever_train.selector.model import Selector


def picks(selector: Selector, query: Tensor, candidates: Tensor, recipe: Recipe) -> Proposals:
    """Proposals for queries [B, d] over pools [B, K, d] of their own, in float64 as always."""
    B, K, d = candidates.shape
    table, pool = candidates.reshape(B * K, d), np.arange(B * K).reshape(B, K)
    asked = Ask(np.arange(B), query, table, pool, own=False)
    return propose(SelectorPolicy("t", copy.deepcopy(selector).double()), asked, recipe)


def greedy(selector: Selector, query: Tensor, candidates: Tensor, shots: int) -> Proposals:
    """The most probable position at every step."""
    recipe = Recipe(shot_num=shots, num_beams=1, temps=(), num_random=0)
    return picks(selector, query, candidates, recipe)
