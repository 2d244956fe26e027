"""The selector against plain oracles: torch's attention, and one softmax per step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lever_data.errors import LeverError
from lever_train.selector import attention as kernels
from lever_train.selector.attention import dropout, picked_scores
from lever_train.selector.closed_form import static_steps
from lever_train.selector.decode import beam, greedy, sample
from lever_train.selector.history import make_selector
from lever_train.selector.model import Selector, SelectorConfig
from lever_train.selector.pool import Pool

SMALL = {"dim": 12, "hidden": 8}


def _selector(**config: object) -> Selector:
    torch.manual_seed(0)
    selector = make_selector(SelectorConfig.model_validate(SMALL | config))
    for parameter in selector.parameters():  # biases and norms away from 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return selector.eval()


def _oracle(selector: Selector, query: Tensor, candidates: Tensor) -> Tensor:
    """Scores [B, K] with ``nn.MultiheadAttention`` and nothing folded."""
    config = selector.config
    state = dict(selector.state_dict())
    inward = state.get("input_proj.weight", torch.eye(config.dim))
    q, c = query @ inward.T, candidates @ inward.T
    for layer in range(config.layers):
        attention = nn.MultiheadAttention(config.hidden, config.heads, batch_first=True)
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
    selector = _selector(layers=layers, heads=heads, dim=dim)
    query, candidates = torch.randn(5, dim), torch.randn(5, 7, dim)
    found = selector.scores(query, candidates)
    torch.testing.assert_close(found, _oracle(selector, query, candidates))


def test_one_pool_for_all_is_that_pool_for_each() -> None:
    selector = _selector()
    query, candidates = torch.randn(5, 12), torch.randn(40, 12)
    shared = selector.scores(query, candidates)
    each = selector.scores(query, candidates.expand(5, 40, 12))
    torch.testing.assert_close(shared, each)


def test_examples_in_several_pools_are_projected_once_and_score_the_same() -> None:
    selector = _selector()
    table, query = torch.randn(30, 12), torch.randn(4, 12)
    ids = torch.tensor([[3, 5, 7], [5, 3, -1], [29, 0, 5], [7, -1, -1]])
    pool = Pool.distinct(table, ids)
    assert pool.vectors.shape[0] == 5
    found = selector.scores(query, pool)
    for row, size in enumerate([3, 2, 3, 1]):
        alone = selector.scores(query[row : row + 1], table[ids[row, :size]][None])
        torch.testing.assert_close(found[row, :size], alone[0])


def test_padding_changes_nothing() -> None:
    for kind in ("static", "gru"):
        selector = _selector(kind=kind)
        query, candidates = torch.randn(1, 12), torch.randn(1, 6, 12)
        positions = torch.tensor([[[2, 4], [5, 1]]])
        padded = torch.cat([candidates, torch.randn(1, 3, 12)], dim=1)
        mask = torch.arange(9)[None] < 6
        alone = selector.sequence_log_prob(query, candidates, positions)
        together = selector.sequence_log_prob(query, padded, positions, pool_mask=mask)
        torch.testing.assert_close(alone, together)


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
    for b in range(2):
        for n in range(3):
            pointer = positions[b, n, : lengths[b, n]].tolist()
            log_probs, mean_nlls = _walk(scores[b], pointer)
            found = steps.log_prob[b, n, : len(pointer)].double()
            torch.testing.assert_close(
                found, torch.tensor(log_probs).double(), rtol=1e-4, atol=2e-5
            )
            smooth = steps.mean_nll[b, n, : len(pointer)].double()
            torch.testing.assert_close(
                smooth, torch.tensor(mean_nlls).double(), rtol=1e-4, atol=2e-5
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
    together = selector.scores(query, candidates)  # 120 rows: the folded projection
    torch.testing.assert_close(together, _oracle(selector, query, candidates))


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 999), 0.1, training=True)
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.002)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.002)
    assert dropout(found, 0.1, training=False) is found


@pytest.mark.parametrize("kind", ["static", "gru"])
def test_picks_agree_with_their_log_probabilities(kind: str) -> None:
    selector = _selector(kind=kind)
    query, candidates = torch.randn(3, 12), torch.randn(3, 7, 12)
    pool = Pool.of(candidates)
    for picks in (
        greedy(selector, query, pool, 3),
        beam(selector, query, pool, 3, width=5),
        sample(selector, query, pool, 3, count=4),
    ):
        expected = selector.sequence_log_prob(query, candidates, picks.positions)
        torch.testing.assert_close(picks.log_prob, expected)
        assert all(len(set(p)) == 3 for row in picks.positions.tolist() for p in row)


@pytest.mark.parametrize("kind", ["static", "gru"])
def test_a_wide_beam_is_exhaustive(kind: str) -> None:
    selector = _selector(kind=kind)
    query, candidates = torch.randn(2, 12), torch.randn(2, 4, 12)
    picks = beam(selector, query, Pool.of(candidates), 2, width=100)
    assert picks.positions.shape == (2, 12, 2)  # 4 · 3 ordered pairs
    torch.testing.assert_close(picks.log_prob.exp().sum(-1), torch.ones(2))
    assert (picks.log_prob.diff(dim=-1) <= 0).all()


def test_samples_follow_the_distribution() -> None:
    torch.manual_seed(0)
    selector = _selector()
    query, candidates = torch.randn(1, 12), torch.randn(1, 3, 12) * 0.1
    picks = sample(selector, query, Pool.of(candidates), 1, count=20_000, temperature=2.0)
    expected = (selector.scores(query, candidates) / 2.0).softmax(-1)[0]
    counts = torch.bincount(picks.positions.flatten(), minlength=3) / 20_000
    torch.testing.assert_close(counts, expected.detach(), atol=0.02, rtol=0)


def test_too_many_shots_for_the_pool() -> None:
    selector = _selector()
    with pytest.raises(LeverError, match="3 demonstrations cannot be picked"):
        greedy(selector, torch.randn(1, 12), Pool.of(torch.randn(1, 2, 12)), 3)


def test_a_gru_remembers_what_it_chose() -> None:
    selector = _selector(kind="gru")
    query, candidates = torch.randn(1, 12), torch.randn(1, 6, 12)
    history = selector.begin(query, Pool.of(candidates))
    one = history.advance(torch.tensor([[0]]), torch.tensor([[1]])).scores()
    other = history.advance(torch.tensor([[0]]), torch.tensor([[2]])).scores()
    assert not torch.allclose(one, other)
    with pytest.raises(LeverError, match="knows 4 steps"):
        selector.sequence_log_prob(query, candidates, torch.arange(5)[None, None])


@pytest.mark.parametrize("kind", ["static", "gru"])
@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_is_close_for_any_pool(kind: str, shared: bool) -> None:
    """Under autocast some of the products are halves and some are not; gradients agree."""
    selector = _selector(kind=kind, layers=2)
    query, vectors = torch.randn(4, 12), torch.randn(7, 12)
    pool = Pool(vectors) if shared else Pool(vectors, torch.stack([torch.randperm(7)] * 4))
    positions = torch.tensor([[[0, 3], [5, 1]]] * 4)
    found = []
    for enabled in (False, True):
        selector.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = selector.sequence_log_prob(query, pool, positions).sum()
        torch.autograd.backward(total)
        gradients = [p.grad.flatten() for p in selector.parameters() if p.grad is not None]
        found.append((float(total.detach()), torch.cat(gradients)))
    (exact, wanted), (half, given) = found
    assert half == pytest.approx(exact, rel=0.05) and half != exact
    assert torch.cosine_similarity(wanted, given, dim=0) > 0.98
