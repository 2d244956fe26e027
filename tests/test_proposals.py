"""Proposals: what is drawn depends on (seed, query) alone, and every log-probability is right."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lever_data.errors import LeverError
from lever_train.options.rollout import Recipe
from lever_train.options.train import ModelConfig
from lever_train.rollout.policy import Policy, SelectorPolicy, Similarity
from lever_train.rollout.propose import METHODS, Ask, Proposals, draw_keys, propose, uniform
from lever_train.selector.kinds import make_selector
from tests.selectors import pool_of

N, D, K = 40, 16, 12
Ids = npt.NDArray[np.int64]


def world(seed: int = 0) -> tuple[torch.Tensor, Ids]:
    """Embeddings [N, D] and a pool [N, K] without the query itself."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool = np.stack([rng.permutation(np.delete(np.arange(N), q))[:K] for q in range(N)])
    return torch.randn(N, D, generator=generator), pool.astype(np.int64)


def ask(ids: Ids, own: bool = True) -> Ask:
    vectors, pool = world()
    return Ask(ids, vectors[ids], vectors, pool[ids], own)


def selector(kind: str) -> Policy:
    torch.manual_seed(1)
    config = ModelConfig.model_validate({"hidden": 8, "selector": kind})
    return SelectorPolicy("t", make_selector(D, config).eval().double())


KINDS = ("static", "gru", "gated", "mmr", "additive", "stop", "features")
POLICIES = [Similarity(), *map(selector, KINDS)]


def test_beams_may_differ_in_their_last_demonstration_alone() -> None:
    """All that the pool holds, after the favourites."""
    ids = np.arange(5)
    recipe = Recipe(shot_num=3, num_beams=K, temps=(), num_random=0, last_alone=True)
    wide = recipe.model_copy(update={"last_alone": False, "num_beams": 1})
    for policy in (Similarity(), selector("features")):
        found, best = (propose(policy, ask(ids), r) for r in (recipe, wide))
        for query in ids:
            pointers = found.pointer[found.row == query]
            assert len({tuple(p[:2]) for p in pointers.tolist()}) == 1
            assert len(set(pointers[:, 2])) == len(pointers) == K - 2
            assert tuple(pointers[0]) == tuple(best.pointer[query])  # here beams find no better


def rows_of(found: Proposals, ids: Ids) -> dict[int, list[tuple[object, ...]]]:
    """Everything stored about each query's candidates, in order."""
    rows: dict[int, list[tuple[object, ...]]] = {}
    for i in range(len(found.row)):
        values = (
            tuple(found.pointer[i]),
            int(found.method[i]),
            int(found.rank[i]),
            *(repr(float(v[i])) for v in (found.score, found.log_prob, found.log_prob_at)),
        )
        rows.setdefault(int(ids[found.row[i]]), []).append(values)
    return rows


@pytest.mark.parametrize("policy", POLICIES, ids=["similarity", *KINDS])
@pytest.mark.parametrize("shots", [1, 2, 3, 4])
def test_proposals_do_not_depend_on_the_batch(policy: Policy, shots: int) -> None:
    recipe = Recipe(shot_num=shots, num_retrieval=2, seed=3)
    ids = np.arange(N)
    together = rows_of(propose(policy, ask(ids), recipe), ids)
    shuffled = np.array([7, 30, 2, 19])
    assert rows_of(propose(policy, ask(shuffled), recipe), shuffled) == {
        q: together[q] for q in shuffled.tolist()
    }


@pytest.mark.parametrize("policy", [Similarity(), selector("stop")], ids=["similarity", "stop"])
def test_a_question_alone_is_proposed_once_behind_the_others(policy: Policy) -> None:
    """A policy that can stop may have proposed it as a beam: then it is not there twice."""
    ids = np.array([4, 0, 9])
    plain, more = (
        propose(policy, ask(ids), Recipe(shot_num=2, num_beams=3, zero_shot=zero))
        for zero in (False, True)
    )
    assert np.all(np.diff(more.row) >= 0)
    for row in range(3):
        before, after = (p.select(p.row == row) for p in (plain, more))
        lengths = (after.pointer >= 0).sum(1)
        assert (lengths == 0).sum() == 1
        had = bool((before.pointer < 0).all(1).any())
        assert len(after.row) == len(before.row) + (not had)
        assert had or (METHODS[int(after.method[-1])] == "empty" and np.isnan(after.log_prob[-1]))
        np.testing.assert_array_equal(after.pointer[: len(before.row)], before.pointer)


def test_another_seed_draws_otherwise_and_beams_stay() -> None:
    ids = np.arange(N)
    one, two = (propose(Similarity(), ask(ids), Recipe(seed=s)) for s in (0, 1))
    beams = [tuple(map(tuple, p.pointer[p.method == 0])) for p in (one, two)]
    drawn = [tuple(map(tuple, p.pointer[p.method == 1])) for p in (one, two)]
    assert beams[0] == beams[1]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("policy", [Similarity(), *(selector(k) for k in KINDS if k != "stop")])
def test_log_probabilities_equal_an_explicit_softmax(policy: Policy) -> None:
    recipe = Recipe(shot_num=3, temps=(1.0, 0.7), num_retrieval=1)
    asked = ask(np.arange(N))
    found = propose(policy, asked, recipe)
    for i in range(0, len(found.row), 7):
        q = int(found.row[i])
        at = float(found.temperature[i])
        expected, expected_at, score = by_hand(policy, asked, q, found.positions[i].tolist(), at)
        assert found.log_prob[i] == pytest.approx(expected, abs=2e-6)
        method = METHODS[int(found.method[i])]
        if method == "sample":
            assert found.log_prob_at[i] == pytest.approx(expected_at, abs=2e-6)
        if method == "beam":
            assert found.score[i] == pytest.approx(score, abs=2e-6)
            assert found.log_prob_at[i] == pytest.approx(expected, abs=2e-6)
        assert np.isnan(found.log_prob_at[i]) == (method in ("random", "retrieval"))


def by_hand(
    policy: Policy, asked: Ask, q: int, positions: list[int], temperature: float
) -> tuple[float, float, float]:
    """Sums over the steps, one sequence at a time: log p at 1, at the temperature, and p."""
    vectors = asked.table[torch.from_numpy(asked.pool[q])].double()
    history = policy.begin(asked.query[q : q + 1].double(), pool_of(vectors[None]))
    log_p = log_q = p = 0.0
    open_ = list(range(K))
    for position in positions:
        scores = history.scores()[0, 0].tolist()
        weights = {k: np.exp(scores[k]) for k in open_}
        cooled = {k: np.exp(scores[k] / temperature) for k in open_}
        p += weights[position] / sum(weights.values())
        log_p += np.log(weights[position] / sum(weights.values()))
        log_q += np.log(cooled[position] / sum(cooled.values()))
        open_.remove(position)
        zero = torch.zeros((1, 1), dtype=torch.long)
        history = history.advance(zero, torch.tensor([[position]]))
    return log_p, log_q, p


def test_beams_are_the_best_of_all_sequences() -> None:
    asked = ask(np.arange(5))
    found = propose(Similarity(), asked, Recipe(temps=(), num_random=0, num_beams=K * K))
    for q in range(5):
        mine = found.select(found.row == q)
        assert len(mine.row) == K * (K - 1)  # every ordered pair, once
        pairs = list(itertools.permutations(range(K), 2))
        assert sorted(map(tuple, mine.positions.tolist())) == pairs
        assert (np.diff(mine.log_prob) <= 1e-6).all()
        assert mine.rank.tolist() == list(range(len(mine.row)))


def test_samples_follow_the_policy() -> None:
    """The share of each first pick over many queries with equal pools is the softmax."""
    count = 4000
    vectors, _ = world()
    pool = np.tile(np.arange(6), (count, 1))
    asked = Ask(np.arange(count) + 100, vectors[7].expand(count, -1), vectors, pool, own=False)
    recipe = Recipe(num_beams=0, num_random=1, temps=(2.0,), num_samples_per_temp=1)
    found = propose(Similarity(), asked, recipe)
    scores = Similarity().begin(vectors[7:8].double(), pool_of(vectors[:6].double())).scores()
    for method, weights in ((1, (scores[0, 0] / 2.0).softmax(-1).numpy()), (2, np.full(6, 1 / 6))):
        first = found.positions[found.method == method][:, 0]
        share = np.bincount(first, minlength=6) / len(first)
        assert share == pytest.approx(weights, abs=5 * np.sqrt(0.25 / len(first)))


def test_duplicates_keep_the_better_source_and_order_matters() -> None:
    vectors, _ = world()
    pool = np.tile(np.arange(3), (50, 1))  # six ordered pairs: everything collides
    asked = Ask(np.arange(50) + 10, vectors[:1].expand(50, -1), vectors, pool, own=False)
    found = propose(Similarity(), asked, Recipe(num_retrieval=2, num_random=3))
    for q in range(50):
        mine = found.select(found.row == q)
        pointers = list(map(tuple, mine.pointer.tolist()))
        assert len(set(pointers)) == len(pointers)
        assert [METHODS[m] for m in mine.method[:5]] == ["beam"] * 5  # all five beams are kept
        assert (np.diff(mine.method) >= 0).all()
        assert {(a, b) for a, b in pointers} & {(b, a) for a, b in pointers}


def test_retrieval_takes_windows_of_the_ranking() -> None:
    asked = ask(np.arange(N))
    found = propose(
        Similarity(), asked, Recipe(num_beams=0, temps=(), num_random=0, num_retrieval=3)
    )
    unit = torch.nn.functional.normalize(asked.table.double(), dim=-1).numpy()
    ranked = asked.pool[0][np.argsort(-(unit[asked.pool[0]] @ unit[0]), kind="stable")]
    assert found.pointer[:3].tolist() == [ranked[i : i + 2].tolist() for i in range(3)]


def test_a_query_is_never_shown_itself_and_pads_are_never_picked() -> None:
    vectors, pool = world()
    pool = pool.copy()
    pool[:, 3] = np.arange(N)  # itself
    pool[:, 9:] = -1
    found = propose(
        Similarity(), Ask(np.arange(N), vectors, vectors, pool, True), Recipe(num_random=5)
    )
    assert (found.pointer >= 0).all()
    assert (found.pointer != found.row[:, None]).all()
    shared = Ask(np.arange(N), vectors, vectors, np.arange(N), True)
    found = propose(Similarity(), shared, Recipe(num_random=5))
    assert (found.pointer != found.row[:, None]).all()
    assert (found.positions == found.pointer).all()


def test_a_pool_that_is_too_small_names_the_query() -> None:
    vectors, pool = world()
    pool = pool.copy()
    pool[5, 1:] = -1
    with pytest.raises(LeverError, match=r"cannot be picked from this query's pool; at query 5"):
        propose(Similarity(), Ask(np.arange(N), vectors, vectors, pool, True), Recipe())


def test_later_rounds_reach_further() -> None:
    ids = np.arange(N)
    first, second = (
        propose(Similarity(), ask(ids), Recipe(round=r, num_retrieval=2)) for r in (0, 1)
    )
    old, new = (
        {(r, *p) for r, p in zip(f.row.tolist(), f.pointer.tolist(), strict=True)}
        for f in (first, second)
    )
    assert len(new - old) >= 7 * N  # five more beams; in so small a pool samples collide


def test_draws_are_uniform_and_keyed() -> None:
    key = draw_keys(0, np.arange(1000), "x")
    numbers = uniform(key, 100)
    assert numbers.min() > 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1
    assert (uniform(key, 10) == numbers[:, :10]).all()  # the count does not matter
    assert not (uniform(draw_keys(1, np.arange(1000), "x"), 1) == numbers[:, :1]).any()
    assert not (uniform(draw_keys(0, np.arange(1000), "y"), 1) == numbers[:, :1]).any()
