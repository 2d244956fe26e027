"""Losses on small groups: ties, groups of one, padding; each variant against a plain formula."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lever_train.learn import losses
from lever_train.learn.batch import Batch
from lever_train.learn.step import adapt_beta, noise_seed, rce_temperature, warm_up
from lever_train.options.train import DenseConfig, GrpoConfig, ModelConfig, TrainConfig
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Pool, Steps
from tests.shared_data import GOLDEN, needs_shared

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 9.0], [0.5, 0.5, 9.0, 9.0], [2.0, 9.0, 9.0, 9.0]])
MASK = torch.tensor(
    [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
)


def test_tied_groups() -> None:
    assert losses.tied_groups(REWARDS, MASK).tolist() == [False, True, True]


def test_listwise_by_hand_and_padding_counts_for_nothing() -> None:
    log_prob = torch.tensor([[-1.0, -2.0, -3.0, 50.0]], requires_grad=True)
    rewards, mask = torch.tensor([[0.3, 0.0, 0.0, 9.0]]), MASK[:1]
    target = torch.tensor([math.exp(0.3 / 0.15), 1.0, 1.0])
    own = torch.tensor([-1.0, -2.0, -3.0]).log_softmax(-1)
    loss = losses.listwise(log_prob, rewards, mask, 0.15)
    torch.testing.assert_close(loss, -(target / target.sum() * own).sum()[None])
    torch.autograd.backward(loss.sum())
    assert log_prob.grad is not None and log_prob.grad[0, 3] == 0


def test_pointwise_is_the_cross_entropy_of_each_reward_alone() -> None:
    score = torch.tensor([[1.0, 4.0, 3.0, 50.0]])
    rewards, mask = torch.tensor([[0.3, 2.0, 0.0, 9.0]]), MASK[:1]
    right = [1 / (1 + math.exp(3 - value)) for value in (1.0, 4.0, 3.0)]
    expected = -(0.3 * math.log(right[0]) + 0.7 * math.log(1 - right[0]))
    expected -= math.log(right[1]) + math.log(1 - right[2])
    torch.testing.assert_close(losses.pointwise(score, rewards, mask), torch.tensor([expected]))


def test_the_hinge_counts_pairs_of_unequal_reward() -> None:
    log_prob = torch.tensor([[-1.0, -1.5, 0.0, 50.0], [-1.0, -2.0, 0.0, 0.0], [0.0] * 4])
    found = losses.pairwise_hinge(log_prob, REWARDS, MASK, 1.0)
    # the first is better than the other two: short of the margin by 0.5 and by 2
    torch.testing.assert_close(found, torch.tensor([1.25, 0.0, 0.0]))


@pytest.mark.parametrize("kind", ["zscore", "center", "loo", "rank"])
def test_a_tied_group_and_a_group_of_one_have_no_advantage(kind: str) -> None:
    found = losses.advantages(REWARDS, MASK, kind)
    assert found.isfinite().all()
    assert (found[1:] == 0).all() and (found[~MASK] == 0).all()
    assert found[0, 0] > 0 > found[0, 1] == found[0, 2]


def test_advantages_by_hand() -> None:
    group, mask = REWARDS[:1, :3], MASK[:1, :3]
    std = math.sqrt(1 / 3)
    expected = {
        "zscore": [2 / 3 / std, -1 / 3 / std, -1 / 3 / std],
        "center": [2 / 3, -1 / 3, -1 / 3],
        "loo": [1.0, -0.5, -0.5],
        "rank": [1.0, -0.5, -0.5],  # the tied two share ranks 0 and 1
    }
    for kind, values in expected.items():
        found = losses.advantages(group, mask, kind)
        torch.testing.assert_close(found, torch.tensor([values]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]), min_size=2, max_size=9))
def test_one_z_score_is_the_legacy_double_one(rewards: list[float]) -> None:
    """Legacy: z-score, then z-score again with the std floored at 0.1; equal for untied groups."""
    group = torch.tensor([rewards], dtype=torch.float64)
    mask = torch.ones_like(group, dtype=torch.bool)
    once = losses.z_score(group, mask)
    twice = losses.z_score(once, mask, losses.SUBSET_STD_FLOOR)
    torch.testing.assert_close(once, twice)


def test_top_k_breaks_ties_by_ordinal() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0, 5.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert losses.top_k_mask(rewards, mask, 2).tolist() == [[False, True, True, False, False]]
    assert losses.top_k_mask(rewards, mask, None) is mask
    assert losses.top_k_mask(rewards, mask, 9) is mask


def test_rce_weights_ignore_padding() -> None:
    weights = losses.rce_weights(REWARDS, MASK, 0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    assert (weights[~MASK] == 0).all()
    torch.testing.assert_close(weights[0, 0] / weights[0, 1], torch.tensor(math.exp(2.0)))


@pytest.mark.parametrize("direction", ["reference_policy", "policy_reference"])
def test_kl_estimates_are_unbiased_or_positive(direction: str) -> None:
    """On all outcomes of two categorical policies, weighted by the policy the draws come from."""
    new = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    first, second = (reference, new) if direction == "reference_policy" else (new, reference)
    exact = float((first.exp() * (first - second)).sum())
    for estimator in ("k1", "k3"):
        values = losses.kl_estimate(new - reference, estimator, direction)
        assert float((first.exp() * values).sum()) == pytest.approx(exact)
    for estimator in ("k2", "k3"):
        values = losses.kl_estimate(new - reference, estimator, direction)
        assert (values >= 0).all()


def _terms(
    log_ratio: list[float], advantage: list[float], **options: float
) -> dict[str, torch.Tensor]:
    shape = torch.tensor([log_ratio])
    return losses.grpo_terms(
        log_prob=shape,
        reference=torch.zeros_like(shape),
        advantage=torch.tensor([advantage]),
        chosen=torch.ones_like(shape, dtype=torch.bool),
        importance=torch.ones_like(shape),
        options=GrpoConfig(**options),
    )


def test_low_and_high_clips_are_apart() -> None:
    up, down = math.log(1.5), math.log(0.5)
    terms = _terms([up, down], [1.0, -1.0], clip_epsilon=0.1, clip_epsilon_high=0.3)
    torch.testing.assert_close(terms["ppo"], torch.tensor([-(1.3 - 0.9) / 2]))
    torch.testing.assert_close(terms["clipped_high"], torch.tensor([0.5]))
    torch.testing.assert_close(terms["clipped_low"], torch.tensor([0.5]))


def test_dual_clip_bounds_the_loss_of_bad_candidates() -> None:
    far = math.log(50.0)
    assert float(_terms([far], [-1.0])["ppo"]) == pytest.approx(50.0, rel=1e-5)
    assert float(_terms([far], [-1.0], dual_clip=3.0)["ppo"]) == pytest.approx(3.0)


def test_importance_weights() -> None:
    reference = torch.tensor([[-1.0, -1.0, -1.0]])
    behaviour = torch.tensor([[-1.0, -3.0, math.nan]])
    weights = losses.importance_weights(reference, behaviour, truncate=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 1.0]]))
    ess = losses.effective_sample_size(weights, torch.ones_like(weights, dtype=torch.bool))
    torch.testing.assert_close(ess, torch.tensor([16.0 / 6.0]))


def test_one_candidate_groups() -> None:
    cross_entropy = torch.tensor([[[1.0, 3.0], [5.0, 0.0]]])
    steps = torch.tensor([[[True, True], [True, False]]])
    for chosen, expected in ((0, 2.0), (1, 5.0)):
        found = losses.one_candidate_groups(cross_entropy, steps, torch.tensor([chosen]))
        assert float(found) == expected


@needs_shared
def test_schedules_are_the_legacy_ones() -> None:
    golden = json.loads((GOLDEN / "rewards.json").read_text())
    for case in golden["temperature_schedule"]:
        assert rce_temperature(case["step"], case["total"]) == pytest.approx(case["expected"])
    for case in golden["adaptive_kl_beta"]:
        found = adapt_beta(
            case["kl"],
            case["beta"],
            case["kl_target_min"],
            case["kl_target_max"],
            case["factor"],
        )
        assert found == pytest.approx(case["expected"], rel=1e-12)


def test_warm_up_and_noise() -> None:
    assert [warm_up(s, 100, 0.05) for s in (0, 4, 5, 99)] == [0.2, 1.0, 1.0, 1.0]
    seeds = {
        noise_seed(s, p, n, r)
        for s in range(3)
        for p in range(3)
        for n in range(99)
        for r in range(2)
    }
    assert len(seeds) == 3 * 3 * 99 * 2


def test_weighted_groups_with_nan_free_gradients() -> None:
    scores: Tensor = torch.randn(3, 4, requires_grad=True)
    weights = losses.rce_weights(REWARDS, MASK, 1.0)
    losses.rce_groups(scores[..., None], weights).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_z_scores_are_clamped_where_the_config_says_so() -> None:
    """The newest legacy trainer bounds them at 3; without the option nothing is bounded."""
    rewards = torch.tensor([[2.0] + [0.0] * 15])
    mask = torch.ones_like(rewards, dtype=torch.bool)
    free = losses.z_score(rewards, mask)
    assert free.max() > 3.5
    torch.testing.assert_close(losses.z_score(rewards, mask, clamp=3.0), free.clamp(-3.0, 3.0))


@pytest.mark.slow
def test_a_selector_that_can_stop_shows_nothing_to_a_strong_answerer() -> None:
    """A simulated answerer, right alone on most questions, where a demonstration harms it;
    on the others a marked one helps. At its own number of shots the selector earns no less than
    the better of zero-shot and one shot, less half a point."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = ModelConfig(selector="features", hidden=8, max_shots=1, can_stop=True, dropout=0.0)
    selector = make_selector(8, config, num_features=2)
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.02)

    def ask(count: int) -> tuple[Tensor, Pool, Tensor]:
        knows, marked = torch.rand(count, generator=generator) < 0.7, torch.zeros(count, 5)
        marked[torch.arange(count), torch.randint(5, (count,), generator=generator)] = 1.0
        shown = torch.where(knows[:, None], 0.5, 0.2 + 0.6 * marked)
        worth = torch.cat([shown, torch.where(knows, 0.9, 0.3)[:, None]], 1)
        features = torch.stack([knows.float()[:, None].expand(-1, 5), marked], 2)
        candidates = torch.randn(5, 8, generator=generator)
        query = torch.randn(count, 8, generator=generator)
        return query, Pool(candidates, features=features), worth

    for _ in range(150):
        query, pool, worth = ask(64)
        right = (torch.rand(worth.shape, generator=generator) < worth).double()
        singles = torch.tensor([0, 1, 2, 3, 4, 0])[None, :, None].expand(64, -1, -1)
        steps = (torch.arange(6) < 5)[None, :, None].expand(64, -1, -1)  # the sixth shows nothing
        nothing = torch.full_like(right, torch.nan)
        every = torch.ones_like(right, dtype=torch.bool)
        batch = Batch(
            torch.arange(64), None, singles, steps, every, right, nothing, nothing.clone()
        )
        options = DenseConfig(objective="pointwise")
        loss = losses.dense(selector, query, pool, batch, options)[0].mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    query, pool, worth = ask(2000)
    scores = selector.eval().begin(query, pool).scores()[:, 0].detach()
    own = worth.gather(1, scores.argmax(1, keepdim=True)).mean()
    one_shot = worth.gather(1, scores[:, :5].argmax(1, keepdim=True)).mean()
    zero_shot = worth[:, 5].mean()
    assert zero_shot > one_shot  # a strong answerer
    assert own > max(zero_shot, one_shot) - 0.005


def test_scores_of_last_picks_are_those_of_every_pointer_alone() -> None:
    """Pointers of one prefix, of several, and shorter ones beside them."""
    torch.manual_seed(0)
    config = ModelConfig(selector="features", hidden=8, mixture=True)
    selector = make_selector(8, config).eval()
    torch.nn.init.normal_(selector.get_parameter("past.weight"))
    query, pool = torch.randn(3, 8), Pool(torch.randn(6, 8))
    pointers = [[[0, 1, 2], [0, 1, 5]], [[4], [2, 3]], [[1, 2, 3], [2, 1, 3]]]
    found = losses.last_scores(selector, query, pool, _pointers(pointers))
    for row, group in enumerate(pointers):
        for column, pointer in enumerate(group):
            alone = _pointers([[pointer]])
            wanted = losses.last_scores(selector, query[row : row + 1], pool, alone)
            torch.testing.assert_close(found[row, column], wanted[0, 0])
    history = selector.begin(query[:1], pool)
    for place in (0, 1):
        history = history.advance(torch.tensor([[0]]), torch.tensor([[place]]))
    torch.testing.assert_close(found[0], history.scores()[0, 0, [2, 5]])


def test_candidates_whose_answers_are_hidden_are_not_compared() -> None:
    """With votes, of places that give nothing to their own answer; a group of none but such keeps
    them, and without votes nobody knows."""
    torch.manual_seed(0)
    batch = replace(_pointers([[[0], [1], [2]], [[0], [1], [2]]]), reward=torch.rand(2, 3).double())
    votes = torch.rand(2, 3, 3) + 0.1
    hidden = torch.tensor([[False, True, False], [True, True, True]])
    votes.diagonal(dim1=1, dim2=2).masked_fill_(hidden, 0.0)
    pool = Pool(torch.randn(3, 8), features=torch.cat([torch.randn(2, 3, 1), votes], -1))
    query, left = torch.randn(2, 8), torch.tensor([[True, False, True], [True, True, True]])
    for objective in ("listwise", "hinge", "pointwise"):
        options = DenseConfig.model_validate({"objective": objective})
        config = ModelConfig(
            selector="features", hidden=8, votes=True, pair_features=("agreement",), dropout=0.0
        )
        selector = make_selector(8, config, num_features=1)
        found = losses.dense(selector, query, pool, batch, options)[0]
        wanted = losses.dense(selector, query, pool, replace(batch, mask=left), options)[0]
        torch.testing.assert_close(found, wanted)
        config = ModelConfig(selector="features", hidden=8, dropout=0.0)
        plain = make_selector(8, config, num_features=4)
        every = losses.dense(plain, query, pool, batch, options)[0]
        fewer = losses.dense(plain, query, pool, replace(batch, mask=left), options)[0]
        assert every[0] != fewer[0] and every[1] == fewer[1]


def _pointers(groups: list[list[list[int]]]) -> Batch:
    B, N = len(groups), max(map(len, groups))
    S = max(len(pointer) for group in groups for pointer in group)
    positions, mask = torch.zeros(B, N, S, dtype=torch.long), torch.zeros(B, N, S, dtype=torch.bool)
    for b, group in enumerate(groups):
        for n, pointer in enumerate(group):
            positions[b, n, : len(pointer)] = torch.tensor(pointer)
            mask[b, n, : len(pointer)] = True
    none = torch.zeros(B, N, dtype=torch.float64)
    return Batch(torch.arange(B), None, positions, mask, mask.any(-1), none, none, none)


def test_supervised_loss_of_the_best_beam_and_of_all() -> None:
    """Two beams, of two steps and of one, and a padded one: means over steps, then over beams."""
    log_prob = -torch.tensor([[[1.0, 3.0], [4.0, 0.0], [0.0, 0.0]]])
    batch = Batch(
        query=torch.tensor([0]),
        pool=None,
        positions=torch.zeros(1, 3, 2, dtype=torch.int64),
        step_mask=torch.tensor([[[True, True], [True, False], [False, False]]]),
        mask=torch.tensor([[True, True, False]]),
        reward=torch.tensor([[0.1, 0.2, 0.0]]),
        behaviour=torch.full((1, 3), torch.nan),
        accuracy=torch.full((1, 3), torch.nan),
    )
    steps = Steps(log_prob, torch.zeros_like(log_prob), batch.step_mask)
    unsmoothed = {"model": {"label_smoothing": 0.0}}
    best, _ = losses.sft(steps, batch, TrainConfig.model_validate(unsmoothed))
    every = TrainConfig.model_validate(unsmoothed | {"sft": {"all_beams": True}})
    assert best.tolist() == [4.0]
    assert losses.sft(steps, batch, every)[0].tolist() == [3.0]
