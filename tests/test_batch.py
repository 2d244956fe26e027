"""Groups to padded tensors: groups of every shape, strict pointers, pools, vectors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lever_train.learn.batch as collating
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import connect
from lever_data.relations.records import DROPPED, GROUP, record
from lever_data.relations.snapshot import Snapshot
from lever_data.store.schema import CANDIDATES, QUERIES
from lever_data.store.store import RunSpec
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import FilePool, PoolSource, SharedPool, StoredPool, open_pools
from lever_train.learn.batch import Batch, collate
from lever_train.selector.model import Pool
from tests.stores import candidate, commit, new_store, table

IDS = SharedPool(np.arange(10, dtype=np.int64))
Group = tuple[int, list[tuple[list[int], float]]]  # query id, (pointer, reward)s


def _collate(
    groups: list[Group], size: int, pools: PoolSource = IDS, **options: Any
) -> list[Batch]:
    """The batches of a snapshot of these groups, in their order."""
    width = max(len(pointer) for _, candidates in groups for pointer, _ in candidates)
    sizes = np.array([len(candidates) for _, candidates in groups])
    found = np.zeros(len(groups), GROUP)
    found["query_id"] = [query for query, _ in groups]
    found["start"], found["size"] = np.cumsum(sizes) - sizes, sizes
    rows = np.zeros(int(sizes.sum()), record((), width))
    flat = [(i, *c) for _, candidates in groups for i, c in enumerate(candidates)]
    for row, (number, pointer, reward) in enumerate(flat):
        padded = pointer + [0] * (rows["pointer"].shape[1] - len(pointer))
        rows[row] = (reward, np.nan, number, len(pointer), padded)
    with tempfile.TemporaryFile() as file:
        rows.tofile(file)
        file.flush()
        snapshot = Snapshot(
            *(found, file.fileno(), rows.dtype, ("d",), ("train",)),
            *(np.empty(0, DROPPED), (), 0),
        )
        return list(collate(snapshot, np.arange(len(groups)), pools, size, **options))


def test_groups_are_padded_and_masked() -> None:
    batch = _collate([(4, [([1, 2], 1.0), ([2, 1], 0.0)]), (5, [([3], 0.5)])], 8)[0]
    assert batch.query.tolist() == [4, 5]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.positions.tolist() == [[[1, 2], [2, 1]], [[3, 0], [0, 0]]]
    assert batch.step_mask.tolist() == [
        [[True, True], [True, True]],
        [[True, False], [False, False]],
    ]
    assert batch.reward.tolist() == [[1.0, 0.0], [0.5, 0.0]]
    assert batch.behaviour.isnan().all() and batch.accuracy.isnan().all()
    assert batch.pool is None


def _asked_before(
    groups: list[Group], size: int, *, patch: pytest.MonkeyPatch, **options: Any
) -> list[Batch]:
    """The batches; each group that is read was asked of the disk before, once."""
    read, asked, its_own = list[int](), list[int](), Snapshot.read

    def reading(snapshot: Snapshot, numbers: Any) -> Any:
        read.extend(numbers.tolist())
        assert read == asked[: len(read)]
        return its_own(snapshot, numbers)

    patch.setattr(Snapshot, "ahead", lambda _, numbers: asked.extend(numbers.tolist()))
    patch.setattr(Snapshot, "read", reading)
    batches = _collate(groups, size, **options)
    patch.setattr(Snapshot, "read", its_own)
    assert read == asked
    return batches


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    read=st.integers(1, 9),
    ask=st.integers(1, 9),
    world=st.integers(1, 3),
)
def test_every_group_comes_once_in_order(
    sizes: list[int], batch_size: int, read: int, ask: int, world: int
) -> None:
    groups: list[Group] = [
        (q, [([(q + i) % 10], q + i / 10) for i in range(n)]) for q, n in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collating, "READ", read)
        patch.setattr(collating, "ASKED", ask)
        shares = [
            _asked_before(groups, batch_size, rank=r, world=world, patch=patch)
            for r in range(world)
        ]
    assert {len(share) for share in shares} == {-(-len(sizes) // batch_size)}
    seen: list[int] = []
    for parts in zip(*shares, strict=True):
        together = sorted(q for part in parts for q in part.query.tolist())
        assert together == list(range(len(seen), len(seen) + len(together)))
        seen += together
        for part in parts:
            for row, query in enumerate(part.query.tolist()):
                rewards = part.reward[row][part.mask[row]].tolist()
                assert rewards == [query + i / 10 for i in range(sizes[query])]
    assert seen == list(range(len(sizes)))


POOLS = FilePool("p.npy", np.array([[5, 3, 9], [7, 0, 2], [1, 6, 4]]))


def test_pointers_become_positions_in_each_querys_pool() -> None:
    batch = _collate([(0, [([9, 5], 1.0)]), (1, [([0, 2], 1.0)])], 8, POOLS)[0]
    assert batch.pool is not None
    assert batch.pool.tolist() == [[5, 3, 9], [7, 0, 2]]
    assert batch.positions.tolist() == [[[2, 0]], [[1, 2]]]


@pytest.mark.parametrize(
    ("pools", "pointer", "message"),
    [
        (POOLS, [9, 7], "leaves the query's pool: 7"),
        (IDS, [9, 10], "leaves the query's pool: 10"),
        (POOLS, [9, 9], "names one example twice"),
        (IDS, [3, 4, 3], "names one example twice"),
        (IDS, [], "wrong length: 0, not at least 1"),
    ],
)
def test_a_bad_pointer_names_the_query(pools: PoolSource, pointer: list[int], message: str) -> None:
    with pytest.raises(LeverError, match=message) as error:
        _collate([(1, [([0], 1.0)]), (0, [([5], 1.0), (pointer, 1.0)])], 8, pools)
    assert error.value.where == "query 0, candidate 1"
    assert error.value.value == pointer


def test_another_shot_number_is_refused_when_one_is_asked_for() -> None:
    with pytest.raises(LeverError, match="wrong length: 1, not 2"):
        _collate([(3, [([1], 1.0)])], 8, shot_num=2)


def test_a_pool_of_any_size_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Group] = [(0, [([9, 5], 1.0), ([3], 1.0)]), (1, [([0, 2], 1.0)])]
    [whole] = _collate(groups, 8, POOLS)
    monkeypatch.setattr(collating, "COMPARED", 3)
    [found] = _collate(groups, 8, POOLS)
    assert found.positions.tolist() == whole.positions.tolist()
    assert whole.positions.tolist() == [[[2, 0], [1, 0]], [[1, 2], [0, 0]]]


def test_a_reward_that_is_not_finite_names_the_candidate() -> None:
    with pytest.raises(LeverError, match="not a finite number") as error:
        _collate([(1, [([0], 1.0)]), (3, [([5], 1.0), ([6], float("inf"))])], 8)
    assert (error.value.where, error.value.value) == ("query 3, candidate 1", float("inf"))


@pytest.mark.slow
def test_a_stored_pool_that_repeats_an_example_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="q")
    key = {"dataset": "d", "split": "train"}
    pools = [{"query_id": 1, "candidate_pool": [3, 4]}, {"query_id": 2, "candidate_pool": [5, 5]}]
    with store.begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(1, 0, [3])]))
        writer.write("queries", table(QUERIES, [key | pool for pool in pools]))
        writer.commit()
    with pytest.raises(LeverError, match="pool holds an example twice") as error:
        open_pools(connect(store), None, "stg_candidates", ("d", "train"))
    assert error.value.where == "query 2"


def test_a_query_without_a_row_in_the_pool_file() -> None:
    with pytest.raises(LeverError, match=r"p\.npy has 3 rows, none for a query") as error:
        _collate([(3, [([4], 1.0)])], 8, POOLS)
    assert error.value.where == "query 3"


def test_stored_pools_of_any_size() -> None:
    pools = StoredPool(np.array([2, 7]), np.array([0, 3, 4]), np.array([5, 6, 8, 1], np.int32))
    batch = _collate([(7, [([1], 1.0)]), (2, [([8, 5], 1.0)])], 8, pools)[0]
    assert batch.pool is not None
    assert batch.pool.tolist() == [[1, -1, -1], [5, 6, 8]]
    assert batch.positions.tolist() == [[[0, 0]], [[2, 0]]]
    distinct = Pool.distinct(torch.arange(10.0)[:, None], batch.pool)
    assert distinct.mask is not None and distinct.index is not None
    assert distinct.mask.tolist() == [[True, False, False], [True, True, True]]
    assert distinct.vectors[distinct.index][1].flatten().tolist() == [5.0, 6.0, 8.0]
    with pytest.raises(LeverError, match="no candidate pool"):
        _collate([(3, [([1], 1.0)])], 8, pools)


def test_the_shared_pool_is_every_id_of_the_selected_runs(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [7, 3]), candidate(4, 0, [3, 12], gen_method="random")])
    pools = open_pools(
        connect(store, only=["stg_candidates", "queries"]), None, "stg_candidates", ("d", "train")
    )
    assert isinstance(pools, SharedPool)
    assert pools.ids.tolist() == [3, 7, 12]


@pytest.mark.slow
def test_pool_files_that_are_none(tmp_path: Path) -> None:
    con = connect(new_store(tmp_path))
    with pytest.raises(UsageError, match="no such pool file"):
        open_pools(con, tmp_path / "none.npy", "stg_candidates", ("d", "train"))
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(LeverError, match=r"one array \[n, K\]"):
        open_pools(con, tmp_path / "flat.npy", "stg_candidates", ("d", "train"))
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(LeverError, match="cannot be read"):
        open_pools(con, tmp_path / "text.npy", "stg_candidates", ("d", "train"))


@pytest.mark.slow
def test_embeddings_of_every_format_are_float32(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    con = connect(new_store(tmp_path))
    vectors = torch.randn(4, 3)
    torch.save(vectors.half(), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", vectors.numpy().astype(np.float64))
    save_file({"v": vectors.bfloat16()}, tmp_path / "a.safetensors")
    for name, digits in (("a.pt", 1e-2), ("a.npy", 1e-6), ("a.safetensors", 5e-2)):
        found = load_embeddings(str(tmp_path / name), con)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, vectors, rtol=digits, atol=digits)


def test_embeddings_by_their_name_in_the_store(tmp_path: Path) -> None:
    from lever_data.store.schema import embeddings

    store = new_store(tmp_path)
    spec = RunSpec(kind="embeddings", dataset="d", split="train", source_sha256="e")
    rows = [
        {"dataset": "d", "split": "train", "name": "clip", "example_id": i, "vector": [i, 2.0]}
        for i in range(3)
    ]
    with store.begin(spec) as writer:
        writer.write("embeddings", table(embeddings(2), rows))
        writer.commit()
    found = load_embeddings("clip", connect(store, only=["embeddings"]))
    assert found.tolist() == [[0.0, 2.0], [1.0, 2.0], [2.0, 2.0]]
    with pytest.raises(UsageError, match="neither a file nor in the selected runs") as error:
        load_embeddings("dino", connect(store, only=["embeddings"]))
    assert "clip" in str(error.value.hint)


@pytest.mark.slow
def test_embeddings_that_are_none(tmp_path: Path) -> None:
    con = connect(new_store(tmp_path))
    torch.save(torch.tensor([[1.0], [torch.nan]]), tmp_path / "nan.pt")
    with pytest.raises(LeverError, match="NaN or infinity") as error:
        load_embeddings(str(tmp_path / "nan.pt"), con)
    assert str(error.value.where).endswith("row 1")
    far = np.ones((70_000, 1))  # rows are looked at in blocks
    far[69_999] = np.inf
    np.save(tmp_path / "far.npy", far)
    with pytest.raises(LeverError, match="NaN or infinity") as error:
        load_embeddings(str(tmp_path / "far.npy"), con)
    assert str(error.value.where).endswith("row 69999")
    torch.save(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]), tmp_path / "zero.pt")
    with pytest.raises(LeverError, match=r"all zeros.*row 1; value '2 of 3 rows'"):
        load_embeddings(str(tmp_path / "zero.pt"), con)
    torch.save(torch.ones(3, 2), tmp_path / "equal.pt")
    with pytest.raises(LeverError, match="nothing tells one item from another"):
        load_embeddings(str(tmp_path / "equal.pt"), con)
    torch.save(torch.zeros(3), tmp_path / "flat.pt")
    with pytest.raises(LeverError, match=r"must be floats \[n, d\]"):
        load_embeddings(str(tmp_path / "flat.pt"), con)
    with pytest.raises(UsageError, match="no such embeddings file"):
        load_embeddings(str(tmp_path / "none.pt"), con)
