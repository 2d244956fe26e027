"""The selector that reads features of every pair of query and candidate.

In go vectors and, beside the pool, features [B, K, F]; out come scores by a small network:

    x_k = [cosine, cosine less the best, log(1 + rank), (features - mean) / deviation]
    score_k = v · gelu(W_x x_k + W_p [mean x of the chosen; step] + W_n [max, mean cos(k, chosen)])
              + (A q) · (B c_k) / √r

The second sum is a bilinear term of rank r of the unit vectors, scaled to length √d. What
depends on the chosen is 0 at the first step. With ``votes`` these scores say whose answers count,
and a candidate is worth what the pool gives to its answer (a vote whose metric is learned):

    w = softmax(cosine / 0.05 + score) over the candidates whose answers may be read
    p_k = Σ_j w_j · what j's annotators give to k's answer
    score_k = log(p_k / (1 - p_k)) + 3

With ``mixture`` the score of a later pick is that of the chosen and it shown together, whose answer
is its own or theirs (worth: σ(score - 3); w, W_t and W_n are learned, from w = 1 and 0):

    share_k = σ(w (cosine_k / 0.05 - log Σ exp(cosine_chosen / 0.05)) + W_t (x_k - mean x of the
              chosen) + W_n [max, mean cos(k, chosen); what their annotators give to k's answer])
    worth = share_k · worth_k + (1 - share_k) · worth of the chosen

With ``can_stop`` the pointer may end before any step, the first included: the end has a score of
its own from the mean and the highest x of the pool. Dropout falls on the hidden layer, on the query
of the bilinear term, and there on the same dimensions of all candidates of a batch:
(A q) · (B D c) = (D Bᵀ A q) · c, so that no candidate is ever projected. Source: the prototype of
the feature selector on OK-VQA; the formula is ours.
"""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.options.train import ModelConfig
from lever_train.selector.attention import dropout, picked_dots
from lever_train.selector.model import RARE, History, Pool, Selector

OWN_FEATURES = 3  # what the selector computes from the vectors itself
VOTE_TEMPERATURE = 0.05  # of the vote before anything is learned, which is the baseline's
_LEAST = 1e-4  # of a share of votes


class FeatureSelector(Selector):
    """See the top of the file."""

    def __init__(self, dim: int, config: ModelConfig, num_features: int = 0) -> None:
        super().__init__(dim, config, num_features)
        h, size = config.hidden, OWN_FEATURES + num_features
        self.pair = nn.Linear(size, h)
        self.past = nn.Linear(size + 1, h, bias=False)
        self.near = nn.Linear(2, h, bias=False)
        self.score = nn.Linear(h, 1, bias=False)  # the softmax does not see a constant
        if config.low_rank:
            self.low_query = nn.Linear(dim, config.low_rank, bias=False)
            self.low_cand = nn.Linear(dim, config.low_rank, bias=False)
        # nothing of the chosen counts until a training with several steps says so
        nn.init.zeros_(self.past.weight)
        nn.init.zeros_(self.near.weight)
        if config.votes:  # it begins as the vote
            self.own = nn.Linear(h, 1, bias=False)
            nn.init.zeros_(self.own.weight)
            nn.init.zeros_(self.score.weight)
            if config.low_rank:
                nn.init.zeros_(self.low_query.weight)
        if config.mixture:
            self.turn = nn.Linear(size, 1)
            self.turn_near = nn.Linear(4, 1, bias=False)
            for weight in (self.turn.weight, self.turn.bias, self.turn_near.weight):
                nn.init.zeros_(weight)
            # it begins as softmax(cosine / 0.05) of the candidate among the chosen
            self.turn_near.weight.data[0, 0] = 1.0
        if num_features:
            self.register_buffer("feature_mean", torch.zeros(num_features))
            self.register_buffer("feature_std", torch.ones(num_features))
        if config.can_stop:
            self.end = nn.Linear(2 * size, h)
            self.end_score = nn.Linear(h, 1)

    def standardise(self, values: Float[Tensor, "R F"]) -> None:
        """Take mean and deviation of the features from those of the training."""
        self.feature_mean = values.mean(0)
        self.feature_std = values.std(0).clamp(min=1e-6)

    def begin(self, query: Float[Tensor, "B d"], pool: Pool) -> History:
        """Start choosing; see :meth:`Selector.begin`.

        Raises:
            LeverError: the pool brings another number of features.
        """
        given = 0 if pool.features is None else pool.features.shape[-1]
        wanted = self.num_features + (pool.size if self.config.votes else 0)
        if given != wanted:
            raise LeverError(
                f"the selector reads {wanted} features of every candidate", value=given
            )
        return PairHistory(self, query, pool)

    def low_rank(self, query: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """Bᵀ A q: the dot product with a candidate's unit vector is the low-rank term.

        Projecting the query through both sides costs 4 d r operations; projecting the candidates
        cost 2 d r for each of some 3,000 distinct in a batch of 64, forward and backward.
        """
        if not self.config.low_rank:
            return torch.zeros_like(query)
        scale = self.dim / math.sqrt(self.config.low_rank)  # of two vectors of length √d
        # autocast makes halves of the products
        a = self.low_query(dropout(query, self.config.dropout, self.training)).to(query.dtype)
        kept = dropout(query.new_ones(self.dim), self.config.dropout, self.training)
        seen: Tensor = (a @ (self.low_cand.weight * kept)).to(query.dtype) * scale
        return seen


class PairHistory(History):
    """W partial sequences of each query, all at the same step.

    Of the chosen, ``None`` before the first: ``total`` [B, W, P]: sum of their x; ``near``,
    ``nears`` [B, W, K]: highest and summed cosine of each candidate with them. With ``mixture``
    also ``worth`` [B, W], their score; ``reach`` [B, W]: log Σ exp(cosine / 0.05); ``agreed``
    [B, W, K]: what their annotators give to each candidate's answer, summed. ``found`` are the
    scores of this step, once they were asked for.
    """

    total: Tensor | None = None
    near: Tensor | None = None
    nears: Tensor | None = None
    worth: Tensor | None = None
    reach: Tensor | None = None
    agreed: Tensor | None = None
    found: Tensor | None = None

    def __init__(self, selector: FeatureSelector, query: Float[Tensor, "B d"], pool: Pool) -> None:
        self.selector, self.pool, self.step = selector, pool, 0
        self.stops = selector.config.ends_pointers
        # a unit vector of each would be a copy of all: products are divided by lengths instead
        self.length: Tensor = pool.lengths
        query = functional.normalize(query, dim=-1)
        # both at once: reading B·K rows of d takes longer than the products with them
        asked = torch.stack([query, selector.low_rank(query)], dim=1)
        self.cosine, self.bilinear = self._dots(asked).to(query.dtype).unbind(1)
        self.x = _with_own(self.cosine, pool, selector)
        self.hidden = selector.pair(self.x)

    def scores(self) -> Float[Tensor, "B W K"]:
        """Scores of the next step; with ``can_stop`` those of the end behind them."""
        net, extra = self.selector, None
        hidden = self.hidden[:, None]
        if self.total is not None and self.near is not None and self.nears is not None:
            share = torch.full_like(self.total[..., :1], self.step / net.config.max_shots)
            extra = net.past(torch.cat([self.total / self.step, share], dim=-1))
            near = torch.stack([self.near, self.nears / self.step], dim=-1)
            hidden = hidden + extra[:, :, None] + net.near(near)
        active = self._active(hidden)
        found: Tensor = net.score(active).squeeze(-1)
        found = found.to(self.bilinear.dtype) + self.bilinear[:, None]
        if net.config.votes:
            found = self._votes(found) + net.own(active).squeeze(-1).to(found.dtype)
        if self.worth is not None:
            found = self._mixed(found)
        self.found = found
        if not self.stops:
            return found
        real = self.pool.mask
        x = self.x if real is None else self.x.masked_fill(~real[..., None], 0.0)
        count = self.pool.size if real is None else real.sum(-1, keepdim=True)
        low = self.x if real is None else self.x.masked_fill(~real[..., None], float("-inf"))
        end = net.end(torch.cat([x.sum(1) / count, low.amax(1)], dim=-1))[:, None]
        end = net.end_score(self._active(end if extra is None else end + extra))
        return torch.cat([found, end.to(found.dtype).expand(-1, found.shape[1], -1)], dim=-1)

    def advance(self, parent: Int[Tensor, "B V"], chosen: Int[Tensor, "B V"]) -> History:
        """Extend sequence ``parent`` by position ``chosen``; behind the end nothing matters."""
        chosen = chosen.clamp(max=self.pool.size - 1)
        later = copy.copy(self)
        later.step, later.found = self.step + 1, None
        later.total = self.x.gather(1, chosen[..., None].expand(-1, -1, self.x.shape[-1]))
        later.near = later.nears = self._dots(functional.normalize(self.pool.at(chosen), dim=-1))
        if self.total is not None and self.near is not None and self.nears is not None:
            later.total = later.total + _of(self.total, parent)
            later.nears = later.nears + _of(self.nears, parent)
            later.near = torch.maximum(later.near, _of(self.near, parent))
        if self.selector.config.mixture:
            self._weigh(later, parent, chosen)
        return later

    def _weigh(
        self, later: PairHistory, parent: Int[Tensor, "B V"], chosen: Int[Tensor, "B V"]
    ) -> None:
        """What :meth:`_mixed` reads of the chosen."""
        if self.found is None:
            self.scores()
        assert self.found is not None
        later.worth = _of(self.found, parent).gather(2, chosen[..., None]).squeeze(-1)
        reach = self.cosine.gather(1, chosen) / VOTE_TEMPERATURE
        agreed = reach.new_zeros(*chosen.shape, self.pool.size)
        if self.selector.config.votes:
            at = chosen[..., None].expand(-1, -1, self.pool.size)
            agreed = self._given().transpose(1, 2).gather(1, at).to(reach.dtype)
        if self.reach is not None and self.agreed is not None:
            reach = torch.logaddexp(reach, self.reach.gather(1, parent))
            agreed = agreed + _of(self.agreed, parent)
        later.reach, later.agreed = reach, agreed

    def _mixed(self, found: Float[Tensor, "B W K"]) -> Float[Tensor, "B W K"]:
        """Scores of the chosen and each candidate shown together: with a share that is learned the
        answer is what the candidate is worth, else what the chosen are."""
        net = self.selector
        assert self.total is not None and self.near is not None and self.nears is not None
        assert self.worth is not None and self.reach is not None and self.agreed is not None
        lead = (self.cosine / VOTE_TEMPERATURE)[:, None] - self.reach[..., None]
        near = torch.stack(
            [lead, self.near, self.nears / self.step, self.agreed / self.step], dim=-1
        )
        turn = net.turn(self.x).squeeze(-1)[:, None] - net.turn(self.total / self.step)
        share = (turn + net.turn_near(near).squeeze(-1)).to(found.dtype).sigmoid()
        own, before = (found - RARE).sigmoid(), (self.worth - RARE).sigmoid()[..., None]
        mixed: Tensor = (share * own + (1 - share) * before).clamp(_LEAST, 1 - _LEAST).logit()
        return mixed + RARE

    def _votes(self, found: Float[Tensor, "B W K"]) -> Float[Tensor, "B W K"]:
        """Scores by the votes of candidates weighed by ``found``."""
        given = self._given().to(found.dtype)
        votes = given.diagonal(dim1=1, dim2=2) > 0  # whose own answer may be read
        weight = found + (self.cosine / VOTE_TEMPERATURE)[:, None]
        weight = weight.masked_fill(~votes[:, None], torch.finfo(found.dtype).min).softmax(-1)
        # under autocast the product is a half, in which 1 - 1e-4 is 1
        share = (weight @ given.transpose(1, 2)).to(found.dtype).clamp(_LEAST, 1 - _LEAST)
        scores: Tensor = share.logit() + RARE
        return scores

    def _given(self) -> Float[Tensor, "B K K"]:
        """What every place of the pool, the column, gives to each candidate's answer."""
        assert self.pool.features is not None
        return self.pool.features[..., self.selector.num_features :]

    def _active(self, hidden: Tensor) -> Tensor:
        return dropout(
            functional.gelu(hidden), self.selector.config.dropout, self.selector.training
        )

    def _dots(self, vectors: Float[Tensor, "B n d"]) -> Float[Tensor, "B n K"]:
        """Dot products with the candidates' unit vectors."""
        pool = self.pool
        if pool.index is None:
            return vectors @ pool.vectors.T / self.length
        return picked_dots(vectors, pool.vectors, pool.index) / self.length[pool.index][:, None]


def _with_own(
    cosine: Float[Tensor, "B K"], pool: Pool, selector: FeatureSelector
) -> Float[Tensor, "B K P"]:
    """The features that the selector computes itself, and those given."""
    open_ = cosine if pool.mask is None else cosine.masked_fill(~pool.mask, float("-inf"))
    rank = open_.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    gap = cosine - open_.amax(-1, keepdim=True)
    own = torch.stack([cosine, gap, rank.to(cosine.dtype).log1p()], dim=-1)
    if pool.features is None:
        return own
    given = pool.features[..., : selector.num_features].to(own.dtype)
    given = (given - selector.feature_mean) / selector.feature_std
    return torch.cat([own, given], dim=-1)


def _of(values: Float[Tensor, "B W c"], parent: Int[Tensor, "B V"]) -> Float[Tensor, "B V c"]:
    return values.gather(1, parent[..., None].expand(-1, -1, values.shape[-1]))
