"""Features of pairs: what they give, that none can see its own answers, and their way to a pick."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_data import catalog, connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Item
from lever_data.store.store import Store
from lever_train.evaluate import baselines
from lever_train.inputs.pair_features import Pairs, pair_features, votes
from lever_train.rollout.propose import Ask

N, M, K, D = 12, 20, 5, 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store" / "features").mkdir(parents=True)
    return Store.create(tmp_path / "store")


def _pairs(store: Store, *, own: bool) -> Pairs:
    """12 queries: the first of the 20 examples themselves where they are ``own``."""
    rng = np.random.default_rng(0)
    words = rng.choice(["a", "b", "c"], (M, 3))
    examples = {
        i: Item("d", "train", i, f"question {i}?", tuple(words[i]), str(words[i, 0]))
        for i in range(M)
    }
    pool = np.stack([rng.permutation(M)[:K] for _ in range(N)])
    pool[3, 4] = -1
    table = torch.from_numpy(rng.normal(size=(M, D)).astype(np.float32))
    asked = [examples[i].question if own else f"other {i}?" for i in range(N)]
    place = ("d", "train" if own else "val", "train")
    ids = np.arange(N)
    return Pairs(
        connect(store, only=["embeddings"]),
        place,
        ids,
        pool,
        table[:N] + 0.1,
        table,
        asked,
        examples,
    )


def _define(store: Store, name: str, sql: str) -> None:
    (store.path / "features" / f"{name}.sql").write_text(sql)


def _value(store: Store, pairs: Pairs, sql: str) -> np.ndarray:
    _define(store, "mine", sql)
    return pair_features(store, pairs, ["mine"]).values[..., 0]


@pytest.mark.slow
def test_votes_are_those_counted_by_hand(store: Store) -> None:
    pairs = _pairs(store, own=False)
    found = pair_features(store, pairs, ["vote", "agreement"])
    at = {name: found.values[..., found.names.index(name)] for name in found.names}
    unit = torch.nn.functional.normalize
    cosine = (unit(pairs.query, dim=1) @ unit(pairs.table, dim=1).T).double().numpy()
    for q in range(N):
        shown = [e for e in pairs.pool[q].tolist() if e >= 0]
        for name, tau in (("vote_05", 0.05), ("vote_20", 0.2)):
            weight = np.exp([cosine[q, e] / tau for e in shown])
            weight /= weight.sum()
            for place, e in enumerate(shown):
                item = pairs.examples[e]
                share = sum(
                    w * pairs.examples[o].answers.count(str(item.answer)) / 3
                    for o, w in zip(shown, weight, strict=True)
                )
                assert at[name][q, place] == pytest.approx(share, abs=2e-5)
                sure = item.answers.count(str(item.answer)) / 3
                assert at["agreement"][q, place] == pytest.approx(sure, abs=1e-6)
    assert (found.values[3, 4] == 0).all()
    real = pairs.pool >= 0
    np.testing.assert_allclose(votes(pairs)[0][real], at["vote_05"][real], atol=1e-6)


def test_votes_between_candidates_are_those_counted_by_hand(store: Store) -> None:
    pairs = _pairs(store, own=True)
    pairs.pool[0] = [0, 5, 6, 7, 8]  # the query itself first
    found = pair_features(store, pairs, ["agreement"], votes=True)
    given = found.of(pairs.query_ids, K)[..., len(found.names) :]
    for q in range(N):
        hidden = [e in (q, -1) for e in pairs.pool[q].tolist()]
        for k, shown in enumerate(pairs.pool[q].tolist()):
            for j, voter in enumerate(pairs.pool[q].tolist()):
                if hidden[k] or hidden[j]:
                    assert given[q, k, j] == 0
                    continue
                share = pairs.examples[voter].answers.count(str(pairs.examples[shown].answer)) / 3
                assert given[q, k, j] == pytest.approx(min(1, share * 10 / 3))
    assert found.of(pairs.query_ids[2:4], 4).shape == (2, 4, len(found.names) + 4)


@pytest.mark.slow
def test_the_vote_picks_the_answer_most_voted_for(store: Store) -> None:
    pairs = _pairs(store, own=False)
    ask = Ask(pairs.query_ids, pairs.query, pairs.table, pairs.pool, False)
    picks = baselines.vote(pairs, ask, 2)
    share, cosine = votes(pairs)
    for q in range(N):
        best = sorted(range(K), key=lambda k: (-share[q, k], -cosine[q, k]))[:2]
        assert picks[q].tolist() == pairs.pool[q, best].tolist()


@pytest.mark.slow
def test_values_are_kept_in_the_store(store: Store) -> None:
    pairs = _pairs(store, own=False)
    first = pair_features(store, pairs, ["vote"])
    assert pair_features(store, pairs, ["vote"]).run == first.run
    rows = connect(store).execute("select name, value from features where query_id = 3").fetchall()
    assert len(rows) == (K - 1) * len(first.names)
    assert [v for n, v in rows if n == "vote_05"] == pytest.approx(first.values[3, :4, 0])


LEAKS = {  # a feature that would read the query's own answers → why it cannot
    "examples": ("select 0 as query, 0 as place, 1.0 as v from examples", "cannot be computed"),
    "by_id": (
        "select p.query, p.place, (o.answer = p.answer)::double as v from pool_pairs as p "
        "left join pool_pairs as o on o.example_id = p.query_id",
        "cannot be computed",
    ),
    "a_file": ("select 0 as query, 0 as place, 1.0 as v from 'x.parquet'", "cannot be computed"),
    "all_pools": (
        "select query, place, count(*) over (partition by answer)::double as v from pool_pairs",
        "depends on other queries",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_refused(store: Store, leak: str) -> None:
    sql, problem = LEAKS[leak]
    with pytest.raises(LeverError, match=problem):
        _value(store, _pairs(store, own=True), sql)


@pytest.mark.parametrize("own", [True, False])
def test_answers_of_the_query_itself_and_of_its_question_are_hidden(
    store: Store, own: bool
) -> None:
    pairs = _pairs(store, own=own)
    pairs.pool[0, :3] = [
        0,
        15,
        16,
    ]  # the query itself, its question in capitals, another
    pairs.pool[0, 3:] = [17, 18]
    examples = dict(pairs.examples)
    examples[15] = Item("d", "train", 15, "QUESTION 0", examples[15].answers, examples[15].answer)
    pairs = replace(pairs, examples=examples)
    shown = "select query, place, (answer is not null)::double as v from pool_pairs"
    assert _value(store, pairs, shown)[0].tolist() == ([0, 0, 1, 1, 1] if own else [1] * 5)
    given = (
        "select p.query, p.place, count(a.share)::double as v from pool_pairs as p "
        "left join pool_answers as a using (query, place) group by all"
    )
    assert (_value(store, pairs, given)[0] > 0).tolist() == [not own, not own, True, True, True]


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("select query, place, 1.0 as v from pool_pairs limit 3", "one row for every pair"),
        ("select query, place, null::double as v from pool_pairs", "null or not finite"),
        ("select query, place from pool_pairs", "gives query, place and its values"),
        ("copy pool_pairs to 'x'", "SELECT"),
    ],
)
def test_what_is_no_feature_is_refused(store: Store, sql: str, problem: str) -> None:
    with pytest.raises(LeverError, match=problem):
        _value(store, _pairs(store, own=False), sql)


def test_a_feature_of_another_definition_is_refused(store: Store) -> None:
    pairs = _pairs(store, own=False)
    _define(store, "mine", "select query, place, similarity as v from pool_pairs")
    named = pair_features(store, pairs, ["mine"]).features
    assert pair_features(store, pairs, named).names == ("v",)
    _define(store, "mine", "select query, place, -similarity as v from pool_pairs")
    with pytest.raises(LeverError, match="not the one that the selector was trained with"):
        pair_features(store, pairs, named)
    with pytest.raises(UsageError, match="no such feature"):
        pair_features(store, pairs, ["yours"])


def test_spaces_are_read_by_their_names(store: Store) -> None:
    pairs = _pairs(store, own=False)
    with pytest.raises(UsageError, match="neither a file nor"):
        pair_features(store, pairs, ["cosine_question"])


@pytest.mark.slow
def test_every_feature_says_what_it_gives(store: Store) -> None:
    for name, feature in catalog.features().items():
        columns = [column.name for column in feature.columns]
        assert columns[:2] == ["query", "place"] and len(columns) > 2, name
        assert feature.purpose and feature.grain == "one row per query and place"
    pairs = _pairs(store, own=False)
    for name in ("vote", "agreement"):
        found = pair_features(store, pairs, [name])
        documented = [column.name for column in catalog.features()[name].columns]
        assert ["query", "place", *found.names] == documented
