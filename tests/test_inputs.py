"""The one check of inputs: vectors, pools and checkpoints belong to the place of the queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.schema import embeddings
from lever_data.store.store import RunSpec, Store
from lever_train.inputs.check import Vectors, check_inputs, split_size
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import FilePool, SharedPool, StoredPool, open_pools
from tests.stores import candidate, commit, commit_examples, new_store, table

FITS: dict[str, Any] = {
    "queries": Vectors("q.npy", 8, 4),
    "candidates": Vectors("c.npy", 20, 4),
    "split": "val",
    "size": 8,
    "last_query": 7,
    "candidate_size": 20,
    "pool": FilePool("p.npy", np.full((8, 2), 19)),
    "checkpoints": {"best.pt": 4},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": Vectors("q.npy", 8, 5)}, "different widths; at q.npy and c.npy; value '5 and"),
        ({"checkpoints": {"a.pt": 4, "b.pt": 6}}, "of width 6, the embeddings have 4; at b.pt and"),
        (
            {"last_query": 8},
            "the query embeddings have 8 rows, none for a query; at q.npy, query 8",
        ),
        ({"size": 9}, "the query embeddings have 8 rows, the split val has 9 questions; at q.npy"),
        ({"candidate_size": 21}, "candidate embeddings have 20 rows, .* has 21 items; at c.npy"),
        ({"pool": FilePool("p.npy", np.zeros((24, 2), int))}, "p.npy has 24 rows, the split val h"),
        ({"pool": FilePool("p.npy", np.zeros((7, 2), int))}, "p.npy has 7 rows, none for a query"),
        (
            {"pool": FilePool("p.npy", np.full((8, 2), 20))},
            "20 rows, none for example 20; at c.npy",
        ),
        ({"pool": SharedPool(np.array([3, 40]))}, "none for example 40"),
    ],
)
def test_what_does_not_belong_is_refused(change: dict[str, Any], message: str) -> None:
    check_inputs(**FITS)
    with pytest.raises(LeverError, match=message):
        check_inputs(**FITS | change)


def test_where_nothing_tells_the_size_of_a_split_any_number_of_rows_that_suffices_will_do() -> None:
    check_inputs(**FITS | {"size": None, "candidate_size": None, "last_query": 3})
    check_inputs(
        **FITS | {"pool": StoredPool(np.array([7]), np.array([0, 1]), np.array([19], "i4"))}
    )


@pytest.mark.long
def test_the_size_of_a_split_is_that_of_its_own_examples(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    place = {"dataset": "d", "split": "train", "question": "what?", "answers": ["a"], "answer": "a"}
    commit_examples(store, [place | {"example_id": i, "question_id": i} for i in range(3)])
    con = connect(store)
    assert split_size(con, "d", "train") == 3
    assert split_size(con, "d", "val") is None


@pytest.mark.slow
def test_pools_are_those_of_the_queries_own_place(tmp_path: Path) -> None:
    """Query 0 of two datasets: each has the ids that its own pointers name."""
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [7, 3])])
    commit(store, [candidate(0, 0, [5, 6]) | {"dataset": "e"}], name="e")
    found = open_pools(
        connect(store, only=["candidates", "queries"]), None, "candidates", ("e", "train")
    )
    assert isinstance(found, SharedPool) and found.ids.tolist() == [5, 6]


def _commit_vectors(store: Store, value: float, rows: int) -> None:
    made = [
        {"dataset": "d", "split": "train", "name": "clip", "example_id": i, "vector": [value, i]}
        for i in range(rows)
    ]
    with store.begin(RunSpec("embeddings", "d", "train", source_sha256=str(value))) as writer:
        writer.write("embeddings", table(embeddings(2), made))
        writer.commit()


def test_vectors_of_one_name_are_those_of_the_newest_run_alone(tmp_path: Path) -> None:
    """A newer run of fewer rows is short, and whoever checks says so; it is not filled up."""
    store = new_store(tmp_path)
    _commit_vectors(store, 1.0, rows=4)
    _commit_vectors(store, 2.0, rows=2)
    assert load_embeddings("clip", connect(store, only=["embeddings"])).tolist() == [
        [2.0, 0.0],
        [2.0, 1.0],
    ]


@pytest.mark.parametrize("row", [0, 5000])
def test_a_pool_that_names_an_example_twice_is_refused(tmp_path: Path, row: int) -> None:
    """-1 fills a shorter pool and may stand there as often as it must."""
    table = np.tile(np.array([4, 7, -1, -1], np.int16), (5001, 1))
    np.save(tmp_path / "pool.npy", table)
    assert open_pools(
        connect(new_store(tmp_path), only=["queries"]), tmp_path / "pool.npy", "candidates"
    )
    table[row, 2] = 4
    np.save(tmp_path / "pool.npy", table)
    with pytest.raises(LeverError, match=f"names an example twice.*query {row}; value 4"):
        open_pools(
            connect(new_store(tmp_path), only=["queries"]), tmp_path / "pool.npy", "candidates"
        )
