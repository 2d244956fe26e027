"""`lever pack` of a selector that reads features of pairs: the picks of `lever eval`, from the SQL
that the folder brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lever_data import catalog, connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place, load_items, majority
from lever_data.items.prompts import Item
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Store
from lever_train import load
from lever_train.evaluate.baselines import greedy
from lever_train.inputs.pair_features import Answers, Pairs, pair_features
from lever_train.options.pack import PackRequest
from lever_train.options.train import ModelConfig
from lever_train.pack import twins
from lever_train.pack.features import PackedFeatures
from lever_train.pack.pack import pack
from lever_train.rollout.policy import load_policy
from lever_train.rollout.propose import Ask
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.features import FeatureSelector
from tests.cases import long, long_except
from tests.stores import commit_examples, new_store

N, D, K, Q = 50, 16, 12, 9
MINE = "select query, place, similarity * length(coalesce(answer, 'none')) as wordy from pool_pairs"
OWN = ("vote", "agreement", "mine")
SPACES = ("cosine_answer",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 50 examples with answers and vectors in three spaces, and 9 other questions."""
    folder = tmp_path_factory.mktemp("pack")
    store, rng = new_store(folder), np.random.default_rng(0)
    said = rng.choice(["a", "bb", "ccc"], (N, 5)).tolist()
    commit_examples(
        store,
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": i, "image_id": i,
             "question": f"what is {i}?", "answers": said[i],
             "answer": None if i % 7 == 0 else said[i][0]}
            for i in range(N)
        ],
    )  # fmt: skip
    for split, rows in (("train", N), ("val", Q)):
        for name in ("question", "answer", "vectors"):
            file = folder / f"{name}_{split}.npy"
            np.save(file, rng.standard_normal((rows, D)).astype(np.float32))
            list(ingest([file], store, IngestOptions(dataset="d", split=split, name=name)))
    (store.path / "features").mkdir()
    (store.path / "features" / "mine.sql").write_text(MINE)
    return folder


def evaluated(
    place: Path, features: tuple[str, ...], *, votes: bool = False
) -> tuple[Path, Any, Any]:
    """A checkpoint that reads the features, the pools it is asked about, and what it picks."""
    store = Store.open(place / "store")
    con, pool = (
        connect(store),
        np.stack([np.random.default_rng(q).permutation(N)[:K] for q in range(Q)]),
    )
    pool[2, -3:] = -1
    queries, table = (
        torch.from_numpy(np.load(place / f"vectors_{s}.npy")) for s in ("val", "train")
    )
    examples = load_items(con, Place("d", "train"))
    asked = [f"other {q}?" for q in range(Q)]
    pairs = Pairs(con, ("d", "val", "train"), np.arange(Q), pool, queries, table, asked, examples)
    found = pair_features(store, pairs, features, votes=votes)
    torch.manual_seed(1)
    config = ModelConfig(selector="features", hidden=8, pair_features=found.features, votes=votes)
    selector = FeatureSelector(D, config, len(found.names))
    selector.standardise(torch.from_numpy(found.values).flatten(0, 1))
    for weight in (selector.past.weight, selector.near.weight):
        torch.nn.init.normal_(weight)  # what was chosen counts
    path = place / f"{'-'.join(features)}-{votes}.pt"
    save_v3(path, selector, Progress(1, "rce", 0.0, {}))
    ask = Ask(np.arange(Q), queries, table, pool, False, found)
    return path, pool, greedy(load_policy(path, "cpu"), ask, 3).tolist()


def packed(place: Path, checkpoint: Path, out: Path) -> Path:
    given = {"candidate_embeddings": str(place / "vectors_train.npy"), "store": place / "store"}
    return pack(PackRequest(checkpoint=checkpoint, out=out, dataset="d", pool_size=K, **given))


@pytest.mark.slow
@pytest.mark.parametrize("votes", long_except([False, True], True))
@pytest.mark.parametrize("features", [long(OWN), (*OWN, *SPACES)])
def test_picks_are_those_of_an_evaluation(
    place: Path, tmp_path: Path, features: tuple[str, ...], votes: bool
) -> None:
    checkpoint, pool, expected = evaluated(place, features, votes=votes)
    selector = load(packed(place, checkpoint, tmp_path / "p"))
    queries = np.load(place / "vectors_val.npy")
    spaces = {"question": np.load(place / "question_val.npy")} if features != OWN else None
    found = selector.select(queries, 3, pools=pool, spaces=spaces)
    assert [[pick.id for pick in row] for row in found] == expected
    alone = {} if spaces is None else {"question": spaces["question"][4]}
    (one,) = selector.select(queries[4:5], 3, pools=pool[4:5], spaces=alone)
    assert [pick.id for pick in one] == expected[4]


@pytest.mark.slow
def test_twins_give_what_the_sql_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """All features of lever, for pools of any kind: padded, of examples that nobody answered."""
    asked = tuple(f for f in catalog.features().values() if twins.have_twins([f]))
    assert len(asked) >= 6
    rng = np.random.default_rng(0)
    assert not twins.have_twins([replace(asked[0], sql=asked[0].sql + " ")])
    names = ("question", "picture", "both", "answer")
    spaces = {name: torch.randn(N, D) for name in names}
    said = [rng.choice(["a", "b", "c", "d"], rng.integers(0, 6)).tolist() for _ in range(N)]
    answer = [rng.choice([*row, "e"]) if n % 3 else None for n, row in enumerate(said)]
    examples = pa.table({"question": ["?"] * N, "answers": said, "answer": answer})
    rows = np.stack([rng.permutation(N)[:K] for _ in range(Q)])
    rows[1, 5:], rows[2, 1:], rows[3, ::2] = -1, -1, -1
    silent = [n for n, row in enumerate(said) if not row][:K]
    rows[4] = -1
    rows[4, : len(silent)] = silent
    queries, given = torch.randn(Q, D), {name: torch.randn(Q, D) for name in names}
    features, vectors = PackedFeatures(asked, spaces, votes=True), torch.randn(N, D)
    found = features.values(queries, rows, examples, vectors, given)
    ours = values_by_sql(monkeypatch, features, (queries, rows, examples, vectors, given))
    assert found.shape == ours.shape == (Q, K, 6 + 1 + 4 * 2 + K)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-6)
    for n in [*range(Q), 0, 0]:  # what one pool brings is kept until another is asked for
        alone = {name: vectors[n : n + 1] for name, vectors in given.items()}
        one = features.values(queries[n : n + 1], rows[n : n + 1], examples, vectors, alone)
        assert torch.equal(one, found[n : n + 1])
    shared = np.repeat(rows[1:2], Q, 0)
    found = features.values(queries, shared, examples, vectors, given)
    ours = values_by_sql(monkeypatch, features, (queries, shared, examples, vectors, given))
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-6)


def values_by_sql(
    monkeypatch: pytest.MonkeyPatch, features: PackedFeatures, asked: tuple[Any, ...]
) -> torch.Tensor:
    """The same values where no feature has a twin."""
    with monkeypatch.context() as patch:
        patch.setattr("lever_train.pack.features.have_twins", lambda _: False)
        return replace(features).values(*asked)


def test_answers_of_rows_are_those_of_items() -> None:
    """Counted by columns as by items: majorities of equals, nobody's answer, an answer that no
    annotator gave."""
    rng = np.random.default_rng(1)
    said = [rng.choice(list("abcd"), rng.integers(0, 6)).tolist() for _ in range(300)]
    answer = [None if n % 3 else str(rng.choice(["a", "e"])) for n in range(300)]
    table = pa.table({"answers": said, "answer": pa.array(answer, pa.string())})
    items = {
        n: Item("", "s", n, "", tuple(row), majority(row) if shown is None else shown)
        for n, (row, shown) in enumerate(zip(said, answer, strict=True))
    }
    none, empty = np.zeros((0, 1), dtype=np.int64), torch.zeros(0, 0)
    place = ("", "q", "s")
    slow = Answers(Pairs(None, place, none[:, 0], none, empty, empty, [], items))
    found = Answers.of_rows(table, place)
    for n in range(300):
        given = []
        for each in (slow, found):
            words, part = each.words.to_pylist(), slice(each.starts[n], each.starts[n + 1])
            shown = None if each.of[n] < 0 else words[each.of[n]]
            shares = zip(each.code[part], each.share[part], strict=True)
            given.append((shown, {words[code]: share for code, share in shares}))
        assert given[0] == given[1]
    table = pa.table({"answers": [["a", None]], "answer": pa.array(["a"])})
    with pytest.raises(LeverError, match="an answer that is null"):
        Answers.of_rows(table, place)


@pytest.mark.long
def test_examples_are_added_with_their_vectors_in_every_space(place: Path, tmp_path: Path) -> None:
    checkpoint, _, _ = evaluated(place, SPACES)
    selector = load(packed(place, checkpoint, tmp_path / "p"))
    query, new = np.ones(D, np.float32), {"example_id": 7000, "question": "new?", "answer": "a"}
    with pytest.raises(UsageError, match="also reads vectors in the space 'answer'"):
        selector.add_examples([new], query[None])
    larger = selector.add_examples([new], query[None], spaces={"answer": query[None]})
    spaces = {"question": query}
    assert 7000 in [pick.id for pick in larger.select(query, K, spaces=spaces)]
    for given, why in (
        (None, "also reads vectors in the space 'question'"),
        ({"question": query[:3]}, "1 vectors of width 16 are wanted in the space 'question'"),
        ({"question": query * np.nan}, "in the space 'question' holds NaN"),
    ):
        with pytest.raises(UsageError, match=why):
            larger.select(query, 1, spaces=given)


@pytest.mark.long
def test_a_pack_whose_sql_was_changed_is_refused(place: Path, tmp_path: Path) -> None:
    checkpoint, _, _ = evaluated(place, OWN)
    folder = packed(place, checkpoint, tmp_path / "p")
    said = json.loads((folder / "config.json").read_text())
    (mine,) = (name for name in said["features"] if name.startswith("mine@"))
    other: dict[str, str] = said["features"] | {mine: MINE + " "}
    for definitions in (other, {}):
        (folder / "config.json").write_text(json.dumps(said | {"features": definitions}))
        with pytest.raises(LeverError, match="lacks a feature as it was trained with"):
            load(folder)


@pytest.mark.long
def test_a_program_needs_no_store_and_imports_no_transformers(place: Path, tmp_path: Path) -> None:
    checkpoint, _, _ = evaluated(place, OWN)
    folder = packed(place, checkpoint, tmp_path / "p")
    program = (
        "import sys, numpy, lever_train; s = lever_train.load(sys.argv[1]);"
        f"print(len(s.select(numpy.ones({D}), 2)));"
        "print([m for m in ('duckdb', 'transformers', 'typer') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2", "['duckdb']"]
