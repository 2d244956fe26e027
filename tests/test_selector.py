"""The selector against plain oracles: torch's attention, and one softmax per step."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.options.rollout import Recipe
from lever_train.options.train import Kind, ModelConfig
from lever_train.selector import attention as kernels
from lever_train.selector.attention import dropout, picked_dots, picked_scores
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import (
    AttentionSelector,
    Pool,
    Selector,
    static_steps,
    vector_lengths,
)
from tests.picks import greedy, picks
from tests.selectors import first_scores, pool_of, sequence_log_prob

DIM = 12
KINDS: tuple[str, ...] = get_args(Kind)
LEGACY = ("gated", "decoder", "mmr", "additive", "bilinear", "stop")


def _selector(kind: str = "static", dim: int = DIM, **options: object) -> Selector:
    torch.manual_seed(0)
    options = {"selector": kind, "hidden": 8} | options
    selector = make_selector(dim, ModelConfig.model_validate(options))
    for parameter in selector.parameters():  # biases and norms away from 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return selector.eval()


def _oracle(selector: Selector, query: Tensor, candidates: Tensor) -> Tensor:
    """Scores [B, K] with ``nn.MultiheadAttention`` and nothing folded."""
    config = selector.config
    state = dict(selector.state_dict())
    inward = state.get("input_proj.weight", torch.eye(selector.dim))
    q, c = query @ inward.T, candidates @ inward.T
    for layer in range(config.num_layers):
        attention = nn.MultiheadAttention(config.hidden, config.num_heads, batch_first=True)
        prefix = f"cross_attn_layers.{layer}."
        attention.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if prefix in k}
        )
        out = attention(q[:, None], c, c)[0][:, 0]
        weight, bias = state[f"attn_norms.{layer}.weight"], state[f"attn_norms.{layer}.bias"]
        q = functional.layer_norm(out + q, (config.hidden,), weight, bias)
    q = functional.normalize(q @ state["query_proj.weight"].T, dim=-1)
    c = functional.normalize(c @ state["cand_proj.weight"].T, dim=-1)
    return torch.einsum("bh,bkh->bk", q, c) / 0.1


def _walk(scores: Tensor, pointer: list[int]) -> tuple[list[float], list[float]]:
    """Log-probability and smoothing term of each step, one softmax per step, in float64.

    A chosen position has the logit -100 in the smoothing term and no share of the softmax.
    """
    logits, log_probs, mean_nlls = scores.double().clone(), [], []
    closed = torch.zeros_like(logits, dtype=torch.bool)
    for chosen in pointer:
        normaliser = logits.masked_fill(closed, -torch.inf).logsumexp(-1)
        log_probs.append(float(logits[chosen] - normaliser))
        mean_nlls.append(float(normaliser - logits.mean()))
        logits[chosen] = -100.0
        closed[chosen] = True
    return log_probs, mean_nlls


@pytest.mark.parametrize(
    ("layers", "heads", "dim"), [(1, 1, 12), (3, 1, 12), (2, 4, 12), (1, 1, 8), (0, 1, 12)]
)
def test_folded_attention_is_multi_head_attention(layers: int, heads: int, dim: int) -> None:
    selector = _selector(num_layers=layers, num_heads=heads, dim=dim)
    query, candidates = torch.randn(5, dim), torch.randn(5, 7, dim)
    found = first_scores(selector, query, candidates)
    torch.testing.assert_close(found, _oracle(selector, query, candidates))


def test_one_pool_for_all_is_that_pool_for_each() -> None:
    selector = _selector()
    query, candidates = torch.randn(5, 12), torch.randn(40, 12)
    shared = first_scores(selector, query, candidates)
    each = first_scores(selector, query, candidates.expand(5, 40, 12))
    torch.testing.assert_close(shared, each)


def test_examples_in_several_pools_are_projected_once_and_score_the_same() -> None:
    selector = _selector()
    table, query = torch.randn(30, 12), torch.randn(4, 12)
    ids = torch.tensor([[3, 5, 7], [5, 3, -1], [29, 0, 5], [7, -1, -1]])
    pool = Pool.distinct(table, ids)
    assert pool.vectors.shape[0] == 5
    found = first_scores(selector, query, pool)
    for row, size in enumerate([3, 2, 3, 1]):
        alone = first_scores(selector, query[row : row + 1], table[ids[row, :size]][None])
        torch.testing.assert_close(found[row, :size], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    selector = _selector(kind)
    query, candidates = torch.randn(1, 12), torch.randn(1, 6, 12)
    positions = torch.tensor([[[2, 4], [5, 1]]])
    padded = torch.cat([candidates, torch.randn(1, 3, 12)], dim=1)
    mask = torch.arange(9)[None] < 6
    alone = sequence_log_prob(selector, query, candidates, positions)
    together = sequence_log_prob(selector, query, padded, positions, pool_mask=mask)
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_pool_is_that_pool_for_each(kind: str) -> None:
    selector = _selector(kind)
    query, candidates = torch.randn(5, 12), torch.randn(9, 12)
    positions = torch.stack([torch.randperm(9)[:3] for _ in range(10)]).view(5, 2, 3)
    shared = sequence_log_prob(selector, query, candidates, positions)
    each = sequence_log_prob(selector, query, candidates.expand(5, 9, 12), positions)
    torch.testing.assert_close(shared, each)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    pool=st.integers(1, 12),
    spread=st.sampled_from([0.1, 3.0, 30.0, 300.0]),
)
def test_closed_form_is_a_softmax_per_step(seed: int, pool: int, spread: float) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(2, pool) * spread
    shots = min(pool, 4)
    lengths = torch.randint(1, shots + 1, (2, 3))
    positions = torch.stack(
        [torch.stack([torch.randperm(pool)[:shots] for _ in range(3)]) for _ in range(2)]
    )
    step_mask = torch.arange(shots) < lengths[..., None]
    steps = static_steps(scores, positions, step_mask)
    # a log-probability is the difference of numbers as large as the scores, each rounded
    rounding = float(torch.finfo(torch.float32).eps * (16 + scores.abs().max()))
    for b in range(2):
        for n in range(3):
            pointer = positions[b, n, : lengths[b, n]].tolist()
            log_probs, mean_nlls = _walk(scores[b], pointer)
            found = steps.log_prob[b, n, : len(pointer)].double()
            torch.testing.assert_close(
                found, torch.tensor(log_probs).double(), rtol=1e-4, atol=rounding
            )
            smooth = steps.mean_nll[b, n, : len(pointer)].double()
            torch.testing.assert_close(
                smooth, torch.tensor(mean_nlls).double(), rtol=1e-4, atol=rounding
            )


def test_removal_does_not_underflow_in_float32() -> None:
    """Found by the property above: the next best is e^-150 of the best."""
    scores = torch.tensor([[150.0, 0.0, -1.0]], requires_grad=True)
    steps = static_steps(scores, torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2, dtype=torch.bool))
    found = float(steps.log_prob[0, 0, 1].detach())
    assert found == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)
    steps.cross_entropy(0.1).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_removal_does_not_cancel_in_float32() -> None:
    """One candidate holds all but e^-20 of the mass: subtracting it in float32 would leave 0."""
    scores = torch.full((1, 64), -10.0)
    scores[0, 5] = 10.0
    positions = torch.tensor([[[5, 0]]])
    steps = static_steps(scores, positions, torch.ones_like(positions, dtype=torch.bool))
    assert float(steps.log_prob[0, 0, 1]) == pytest.approx(-math.log(63), abs=1e-5)


def test_gradients_of_the_closed_form() -> None:
    torch.manual_seed(1)
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[[0, 3], [5, 0]], [[1, 2], [4, 0]]])
    mask = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]]])
    pool_mask = torch.tensor([[True] * 6, [True] * 5 + [False]])

    def value(scores: Tensor) -> Tensor:
        steps = static_steps(scores, positions, mask, pool_mask)
        return steps.cross_entropy(0.1)

    assert torch.autograd.gradcheck(value, (scores,))


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_a_pool_as_small_as_the_pointer_has_finite_gradients(spread: float) -> None:
    scores = (torch.randn(1, 2) * spread).requires_grad_()
    positions = torch.tensor([[[0, 1], [1, 0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    static_steps(scores, positions, mask).cross_entropy(0.1).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_gradients_of_picked_scores() -> None:
    query = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    units = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 1], [5, 0, 2], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda q, u: picked_scores(q, u, index), (query, units))


def test_gradients_of_picked_dots_that_are_gathered_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One room for all parts would be overwritten before the backward pass reads it."""
    query = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 4, dtype=torch.float64)
    index = torch.tensor([[0, 1, 1], [5, 0, 2], [1, 1, 1]])
    whole = picked_dots(query, rows, index)
    monkeypatch.setattr(kernels, "_CACHE", 1)
    assert torch.equal(picked_dots(query, rows, index), whole)
    with torch.no_grad():
        assert torch.equal(picked_dots(query, rows, index), whole)
    assert torch.autograd.gradcheck(lambda q: picked_dots(q, rows, index), (query,))


@pytest.mark.slow
def test_gradients_of_kernels_that_work_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ROWS", 3)
    monkeypatch.setattr(kernels, "_CACHE", 200)
    vectors = torch.randn(8, 5, dtype=torch.float64)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def noisy(weight: Tensor) -> Tensor:
        torch.manual_seed(0)
        return kernels.unit_rows(vectors, weight, 0.3)

    assert torch.autograd.gradcheck(lambda w: kernels.unit_rows(vectors, w, 0.0), (weight,))
    assert torch.autograd.gradcheck(noisy, (weight,))
    query = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    index, mask = torch.randint(0, 8, (6, 4)), torch.rand(6, 4) > 0.2
    mask[:, 0] = True
    attend = kernels.picked_attention
    assert torch.autograd.gradcheck(lambda q: attend(q, vectors, index, mask, 0.0), (query,))


def test_a_large_pool_is_projected_as_a_small_one() -> None:
    selector = _selector()
    query, candidates = torch.randn(3, 12), torch.randn(3, 40, 12)
    together = first_scores(selector, query, candidates)  # 120 rows: the folded projection
    torch.testing.assert_close(together, _oracle(selector, query, candidates))


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 999), 0.1, training=True)
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.002)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.002)
    assert dropout(found, 0.1, training=False) is found


@pytest.mark.parametrize("kind", KINDS)
def test_picks_agree_with_their_log_probabilities(kind: str) -> None:
    """Beams, samples and random picks in float64, step by step; all of them at once in float32."""
    selector = _selector(kind, max_shots=3)
    query, candidates = torch.randn(3, 12), torch.randn(3, 30, 12)
    found = picks(selector, query, candidates, Recipe(shot_num=3))
    for row in range(3):
        mine = found.select(found.row == row)
        assert set(mine.method.tolist()) == {0, 1, 2}
        positions = torch.from_numpy(mine.positions)[None]
        log_prob = sequence_log_prob(
            selector,
            query[row : row + 1],
            candidates[row : row + 1],
            positions.clamp(min=0),
            positions >= 0,
        )
        assert mine.log_prob == pytest.approx(log_prob[0].detach().numpy(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_beam_is_exhaustive(kind: str) -> None:
    selector = _selector(kind, max_shots=2)
    query, candidates = torch.randn(2, 12), torch.randn(2, 4, 12)
    found = picks(
        selector, query, candidates, Recipe(shot_num=2, num_beams=100, temps=(), num_random=0)
    )
    for row in range(2):
        mine = found.select(found.row == row)
        pairs = list(itertools.permutations(range(4), 2))
        if kind == "stop":
            pairs += [(-1, -1), *((k, -1) for k in range(4))]
        assert sorted(map(tuple, mine.positions.tolist())) == sorted(pairs)
        assert math.fsum(math.exp(v) for v in mine.log_prob) == pytest.approx(1, abs=1e-4)
        assert all(a >= b for a, b in itertools.pairwise(mine.log_prob))


def _legacy_logits(
    selector: Selector, query: Tensor, candidates: Tensor, pointer: list[int]
) -> list[Tensor]:
    """Logits [K (+ 1)] before every pick of one query, written down from the legacy models."""
    state = dict(selector.state_dict())
    kind = selector.config.selector
    weight = state["input_proj.weight"]
    assert isinstance(selector, AttentionSelector)
    q = selector.attend(query[None], Pool(candidates))[0]
    u = functional.normalize(state["query_proj.weight"] @ q, dim=-1)
    c = functional.normalize(candidates @ weight.T @ state["cand_proj.weight"].T, dim=-1)
    if kind == "stop":
        c = torch.cat([c, functional.normalize(state["stop_token"], dim=-1)])
    cell = nn.GRUCell(8, 8)
    if "decoder_gru.weight_ih" in state:
        cell.load_state_dict({n: state[f"decoder_gru.{n}"] for n in cell.state_dict()})
    found = []
    for t, pick in enumerate([*pointer, 0]):
        h = functional.normalize(u + state["step_emb.weight"][t], dim=-1) if kind != "gated" else u
        logits = c @ h
        if kind == "additive":
            mixed = state["attn_Wq.weight"] @ h + state["attn_Wq.bias"]
            logits = (mixed + c @ state["attn_Wc.weight"].T).tanh() @ state["attn_v.weight"][0]
        elif kind == "bilinear":
            logits = torch.stack([h @ state["bilinear.weight"][0] @ row for row in c])
        logits = logits / 0.1
        if kind == "mmr" and t > 0:
            near = torch.stack([c @ c[before] for before in pointer[:t]]).amax(0)
            logits = logits - torch.log1p(state["div_lambda"][t].exp()) * near
        found.append(logits)
        if kind == "gated":
            both = torch.cat([u, c[pick]])
            g = (
                state["query_update_gate.weight"] @ both + state["query_update_gate.bias"]
            ).sigmoid()
            u = functional.normalize(g * u + (1 - g) * c[pick], dim=-1)
        else:
            u = functional.normalize(cell(c[pick][None], u[None])[0], dim=-1)
    return found


@pytest.mark.parametrize("kind", LEGACY)
def test_the_legacy_kinds_are_their_formulas(kind: str) -> None:
    selector = _selector(kind)
    query, candidates = torch.randn(12), torch.randn(6, 12)
    pointer = [4, 1, 3]
    with torch.no_grad():
        logits = _legacy_logits(selector, query, candidates, pointer)
        found = selector.steps(
            query[None],
            Pool(candidates),
            torch.tensor([[pointer]]),
            torch.ones(1, 1, 3, dtype=torch.bool),
        )
    wanted = [*pointer, 6] if kind == "stop" else pointer
    assert found.mask.sum() == len(wanted)
    for t, pick in enumerate(wanted):
        masked = logits[t].scatter(0, torch.tensor(pointer[:t], dtype=torch.long), -100.0)
        log_p = masked.log_softmax(-1)
        torch.testing.assert_close(found.log_prob[0, 0, t], log_p[pick])
        torch.testing.assert_close(found.mean_nll[0, 0, t], -log_p.mean())


def test_a_gate_saturated_to_identity_is_the_static_selector() -> None:
    gated, static = _selector("gated"), _selector("static")
    shared = {n: v for n, v in gated.state_dict().items() if "gate" not in n}
    static.load_state_dict(shared, strict=True)
    query, candidates = torch.randn(24, 12), torch.randn(24, 30, 12)
    before = greedy(gated, query, candidates, 4).positions
    plain = greedy(static, query, candidates, 4).positions
    assert (before == plain).all(1).sum() < 24  # an untrained gate picks otherwise
    assert (before[:, 0] == plain[:, 0]).all()  # but for the first, which nothing precedes
    gated.state_dict()["query_update_gate.bias"].fill_(1e4)
    assert (greedy(gated, query, candidates, 4).positions == plain).all()
    positions = torch.from_numpy(plain)[:, None]
    torch.testing.assert_close(
        sequence_log_prob(gated, query, candidates, positions),
        sequence_log_prob(static, query, candidates, positions),
    )


def test_diversity_alone_avoids_a_copy_of_what_was_chosen() -> None:
    selector = _selector("mmr", decoder_gru=False, step_embedding=False)
    query, candidates = torch.randn(1, 12), torch.randn(1, 6, 12)
    first = int(greedy(selector, query, candidates, 1).positions[0, 0])
    twins = torch.cat([candidates, candidates[:, first : first + 1]], dim=1)
    selector.state_dict()["div_lambda"].fill_(-50.0)  # softplus 0: no penalty, the twin comes next
    assert set(greedy(selector, query, twins, 2).positions[0].tolist()) == {first, 6}
    selector.state_dict()["div_lambda"].fill_(50.0)
    assert set(greedy(selector, query, twins, 2).positions[0].tolist()) != {first, 6}


@pytest.mark.parametrize("kind", ["stop", "features"])
def test_pointers_of_every_length_share_one_distribution(kind: str) -> None:
    """A selector that can stop: the empty pointer, all singles, all pairs and no more sum to 1."""
    selector = _selector(kind, max_shots=2, can_stop=True)
    query, candidates = torch.randn(1, 12), torch.randn(1, 5, 12)
    pointers = [p for n in range(3) for p in itertools.permutations(range(5), n)]
    positions = torch.tensor([[[*p, 0, 0][:2] for p in pointers]])
    mask = torch.tensor([[[i < len(p) for i in range(2)] for p in pointers]])
    log_prob = sequence_log_prob(selector, query, candidates, positions, mask)
    assert float(log_prob.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def _features(count: int, **options: object) -> Selector:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"selector": "features", "hidden": 8} | options)
    return make_selector(DIM, config, count).eval()


def test_a_feature_selector_is_its_formula() -> None:
    """First and second pick of one query, written down from the top of ``features.py``."""
    selector, state = _features(2), _features(2).state_dict()
    query, candidates = torch.randn(DIM), torch.randn(6, DIM)
    features, chosen = torch.randn(1, 6, 2), 3
    q, c = functional.normalize(query, dim=-1), functional.normalize(candidates, dim=-1)
    cosine = c @ q
    rank = torch.tensor([float((cosine > value).sum()) for value in cosine])
    x = torch.cat(
        [torch.stack([cosine, cosine - cosine.max(), (1 + rank).log()], 1), features[0]], 1
    )
    low = (c @ state["low_cand.weight"].T) @ (state["low_query.weight"] @ q) * DIM / 8
    hidden = x @ state["pair.weight"].T + state["pair.bias"]
    first = functional.gelu(hidden) @ state["score.weight"][0] + low
    past = state["past.weight"] @ torch.cat([x[chosen], torch.tensor([1 / 4])])
    near = torch.stack([c @ c[chosen], c @ c[chosen]], 1) @ state["near.weight"].T
    second = functional.gelu(hidden + past + near) @ state["score.weight"][0] + low
    history = selector.begin(query[None], Pool(candidates, features=features))
    torch.testing.assert_close(history.scores()[0, 0], first)
    later = history.advance(torch.tensor([[0]]), torch.tensor([[chosen]]))
    torch.testing.assert_close(later.scores()[0, 0], second)


def test_pairs_score_the_same_wherever_their_rows_lie() -> None:
    """Rows of a table, as a training reads them, or a copy of the distinct ones; with one noise."""
    selector = _features(2, dropout=0.5)
    table, query = torch.randn(30, DIM), torch.randn(3, DIM)
    ids = torch.tensor([[3, 5, 7], [5, 3, -1], [29, 0, 5]])
    features = torch.randn(3, 3, 2)
    distinct = Pool.distinct(table, ids)
    copied = Pool(distinct.vectors, distinct.index, distinct.mask, features)
    lying = Pool(table, ids.clamp(min=0), ids >= 0, features, vector_lengths(table))
    for is_training in (False, True):
        selector.train(is_training)
        found = []
        for pool in (copied, lying):
            torch.manual_seed(1)
            found.append(selector.begin(query, pool).scores()[:, 0][ids >= 0])
        torch.testing.assert_close(*found)


def test_a_later_pick_is_worth_a_mixture_of_it_and_those_before() -> None:
    """The second and the third pick of one query, written down from ``features.py``."""
    selector = _features(2, mixture=True)
    state = selector.state_dict()
    plain = _features(2)
    plain.load_state_dict({n: v for n, v in state.items() if not n.startswith("turn")})
    state["turn.weight"].normal_()
    state["turn_near.weight"].normal_()
    query, candidates, features = torch.randn(1, DIM), torch.randn(6, DIM), torch.randn(1, 6, 2)
    pool = Pool(candidates, features=features)
    c = functional.normalize(candidates, dim=-1)
    cosine = c @ functional.normalize(query[0], dim=-1)
    x = torch.cat(
        [torch.stack([cosine, cosine - cosine.max(), _log_rank(cosine)], 1), features[0]], 1
    )
    found, own = selector.begin(query, pool), plain.begin(query, pool)
    torch.testing.assert_close(found.scores(), own.scores())
    worth, chosen = torch.sigmoid(found.scores()[0, 0, 3] - 3), [3]
    for pick in (3, 5):
        found, own = (
            h.advance(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[pick]]))
            for h in (found, own)
        )
        near = c @ c[chosen].T
        lead = cosine / 0.05 - (cosine[chosen] / 0.05).logsumexp(0)
        read = torch.stack([lead, near.amax(1), near.mean(1), torch.zeros(6)], 1)
        turn = (x - x[chosen].mean(0)) @ state["turn.weight"][0] + read @ state["turn_near.weight"][
            0
        ]
        share = turn.sigmoid()
        wanted = share * torch.sigmoid(own.scores()[0, 0] - 3) + (1 - share) * worth
        torch.testing.assert_close(found.scores()[0, 0], wanted.clamp(1e-4, 1 - 1e-4).logit() + 3)
        worth = wanted[5]
        chosen.append(5)


def _log_rank(cosine: torch.Tensor) -> torch.Tensor:
    return (cosine[:, None] < cosine).sum(1).double().add(1).log().float()


def test_votes_are_weighed_by_scores_and_begin_as_the_vote() -> None:
    """Four candidates; the last, whose answer may not be read, has no vote and gets none."""
    selector = _features(1, votes=True, pair_features=("vote",))
    query, candidates = torch.randn(1, DIM), torch.randn(4, DIM)
    given = torch.tensor(
        [[1.0, 0.6, 0.0, 0.0], [0.3, 1.0, 1.0, 0.0], [0.3, 1.0, 1.0, 0.0], [0.0] * 4]
    )
    features = torch.cat([torch.randn(4, 1), given], dim=1)[None]
    pool = Pool(candidates, features=features)
    cosine = functional.cosine_similarity(query, candidates)
    weight = (cosine[:3] / 0.05).softmax(0)
    vote = given[:, :3] @ weight
    torch.testing.assert_close(
        selector.begin(query, pool).scores()[0, 0].detach(), vote.clamp(1e-4, 1 - 1e-4).logit() + 3
    )
    state = selector.state_dict()
    state["score.weight"][0, 0], state["own.weight"][0, 1] = 2.0, 3.0
    rank = (cosine[:, None] < cosine).sum(1).double().log1p().float()
    x = torch.stack([cosine, cosine - cosine.max(), rank, features[0, :, 0]], 1)
    active = functional.gelu(x @ state["pair.weight"].T + state["pair.bias"])
    vote = given[:, :3] @ (cosine[:3] / 0.05 + 2 * active[:3, 0]).softmax(0)
    torch.testing.assert_close(
        selector.begin(query, pool).scores()[0, 0].detach(),
        vote.clamp(1e-4, 1 - 1e-4).logit() + 3 + 3 * active[:, 1],
    )
    agreed = Pool(candidates, features=torch.ones_like(features))
    with torch.autocast("cpu", torch.bfloat16):
        assert selector.begin(query, agreed).scores().isfinite().all()


def test_features_that_are_not_there_are_refused() -> None:
    with pytest.raises(LeverError, match="reads 2 features of every candidate"):
        first_scores(_features(2), torch.randn(1, DIM), torch.randn(1, 6, DIM))


@pytest.mark.long
def test_a_selector_that_can_stop_learns_to_show_nothing() -> None:
    """Where the first feature says so, an empty pointer is best; elsewhere the marked candidate."""
    selector = _features(2, max_shots=1, can_stop=True).train()
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.02)
    positions = torch.tensor([[[k] for k in [*range(5), 0]]]).expand(32, -1, -1)
    mask = torch.arange(6)[None, :, None].expand(32, 6, 1) < 5  # the sixth candidate is empty
    for _ in range(150):
        is_idle, marked = torch.rand(32) < 0.5, torch.randint(5, (32,))
        features = torch.zeros(32, 5, 2)
        features[..., 0] = is_idle.float()[:, None]
        features[torch.arange(32), marked, 1] = 1.0
        pool = pool_of(torch.randn(32, 5, DIM))
        pool = Pool(pool.vectors, pool.index, features=features)
        log_prob = selector.steps(torch.randn(32, DIM), pool, positions, mask).sequence_log_prob()
        best = torch.where(is_idle, torch.tensor(5), marked)
        optimizer.zero_grad()
        loss = functional.cross_entropy(log_prob, best)
        torch.autograd.backward(loss)
        optimizer.step()
    assert float((log_prob.argmax(-1) == best).float().mean()) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    selector = _selector(kind, can_stop=True).train()
    query, candidates = torch.randn(4, 12), torch.randn(4, 9, 12)
    positions = torch.stack([torch.randperm(9)[:3] for _ in range(8)]).view(4, 2, 3)
    mask = torch.ones_like(positions, dtype=torch.bool)
    mask[0, 0] = torch.tensor([True, False, False])
    steps = selector.steps(query, pool_of(candidates), positions, mask)
    torch.autograd.backward(steps.cross_entropy(0.1).sum())
    for name, parameter in selector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_gru_remembers_what_it_chose() -> None:
    selector = _selector("gru")
    query, candidates = torch.randn(1, 12), torch.randn(1, 6, 12)
    history = selector.begin(query, pool_of(candidates))
    one = history.advance(torch.tensor([[0]]), torch.tensor([[1]])).scores()
    other = history.advance(torch.tensor([[0]]), torch.tensor([[2]])).scores()
    assert not torch.allclose(one, other)
    with pytest.raises(LeverError, match="knows 4 steps"):
        sequence_log_prob(selector, query, candidates, torch.arange(5)[None, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_is_close_for_any_pool(kind: str, shared: bool) -> None:
    """Under autocast some of the products are halves and some are not; gradients agree."""
    selector = _selector(kind, num_layers=2)
    query, vectors = torch.randn(4, 12), torch.randn(7, 12)
    pool = Pool(vectors) if shared else Pool(vectors, torch.stack([torch.randperm(7)] * 4))
    positions = torch.tensor([[[0, 3], [5, 1]]] * 4)
    found = []
    for enabled in (False, True):
        selector.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = sequence_log_prob(selector, query, pool, positions).sum()
        torch.autograd.backward(total)
        gradients = [p.grad.flatten() for p in selector.parameters() if p.grad is not None]
        found.append((float(total.detach()), torch.cat(gradients)))
    (exact, wanted), (half, given) = found
    assert half == pytest.approx(exact, rel=0.05) and half != exact
    assert torch.cosine_similarity(wanted, given, dim=0) > 0.98
