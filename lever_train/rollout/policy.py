"""The policy that proposes: a trained selector, or similarity alone.

In go a checkpoint, or nothing; out comes a :class:`Policy` that scores a pool for a query and can
be asked step by step. Scores are computed in float64 and rounded to six decimals: a matrix product
differs in its last bits with the number of rows in the batch, and a proposal must not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lever_data.store.files import sha256_file
from lever_train.inputs.devices import open_device
from lever_train.selector.model import History, Pool, Selector, StaticHistory, cosine_scores

if TYPE_CHECKING:
    from lever_data.store.store import Store
    from lever_train.inputs.pair_features import PairFeatures, Pairs

SCORE_DECIMALS = 6


class Policy(Protocol):
    """What proposals need of a policy."""

    @property
    def name(self) -> str:
        """What the column ``policy`` says: ``similarity``, or the checkpoint's name and hash."""
        ...

    def begin(self, query: Tensor, pool: Pool) -> History:
        """Start choosing for queries [B, d] float64."""
        ...


class Similarity:
    """No checkpoint: scores are cosine similarities divided by 0.1, as the selector's are."""

    name = "similarity"

    def begin(self, query: Tensor, pool: Pool) -> History:
        """Scores [B, 1, K] that stay the same at every step."""
        scores = cosine_scores(
            functional.normalize(query, dim=-1),
            functional.normalize(pool.vectors, dim=-1),
            pool,
        )
        return StaticHistory(scores.round(decimals=SCORE_DECIMALS)[:, None, :])


@dataclass(frozen=True)
class SelectorPolicy:
    """A selector from a checkpoint, in float64."""

    name: str
    selector: Selector

    @torch.no_grad()
    def begin(self, query: Tensor, pool: Pool) -> History:
        """The selector's own history, its scores rounded."""
        return _RoundScores(self.selector.begin(query, pool))


class _RoundScores(History):
    def __init__(self, inner: History) -> None:
        self.inner = inner
        self.stops = inner.stops

    def scores(self) -> Tensor:
        return self.inner.scores().round(decimals=SCORE_DECIMALS)

    def advance(self, parent: Tensor, chosen: Tensor) -> History:
        return _RoundScores(self.inner.advance(parent, chosen))


def load_policy(checkpoint: Path | None, device: str) -> Policy:
    """The policy of a checkpoint file, or similarity where there is none."""
    open_device(device)
    if checkpoint is None:
        return Similarity()
    from lever_train.selector.checkpoint import load_selector

    selector, _ = load_selector(checkpoint)
    name = f"{checkpoint.name}@{sha256_file(checkpoint)[:12]}"
    return SelectorPolicy(name, selector.double().to(device))


def policy_features(policy: Policy, store: Store, pairs: Pairs) -> PairFeatures | None:
    """What the policy reads of the pairs, defined as when it was trained; ``None``: nothing.

    Raises:
        LeverError: a feature is no longer what it was, or cannot be computed.
    """
    if not isinstance(policy, SelectorPolicy) or not policy.selector.config.pair_features:
        return None
    # here: DuckDB is for selectors of features alone, and a packed one is none
    from lever_train.inputs.pair_features import pair_features

    config = policy.selector.config
    return pair_features(store, pairs, config.pair_features, votes=config.votes)


def widths(policies: Iterable[Policy]) -> dict[str, int]:
    """The width of the embeddings that each trained policy takes, by its name."""
    return {p.name: p.selector.dim for p in policies if isinstance(p, SelectorPolicy)}
