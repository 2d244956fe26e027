"""Opening what was opened before: nothing reads the view again, and what it gives is the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_data.relations import snapshot
from lever_data.store.store import Store
from lever_train.inputs import pools
from lever_train.inputs.pools import SharedPool
from lever_train.learn import data, split
from lever_train.learn.data import describe_data, open_data
from lever_train.options.train import Source, TrainConfig
from tests.stores import candidate, commit, new_store


def _store(path: Path) -> Store:
    store = new_store(path)
    rows = [
        candidate(q, c, [100 + c, 101 + q], correct=q * c % 3 % 2, score=0.5, scorer="m")
        for q in range(30)
        for c in range(3)
    ]
    commit(store, rows)
    np.save(path / "v.npy", np.arange(1, 401, dtype=np.float32).reshape(200, 2))
    return store


def _opened(store: Store, **options: Any) -> Sequence[Any]:
    """All that training reads of it."""
    asked = {"view": ["all_candidates"], "query_embeddings": str(store.path.parent / "v.npy")}
    config = TrainConfig.model_validate({"data": asked | options})
    found = open_data(Source(store=store.path), config)
    split = found.con.execute("select * from split_queries order by all").fetchall()
    assert isinstance(found.pools, SharedPool)
    kept = found.pools.ids.tolist(), found.provenance["queries"], found.provenance["dropped"]
    return [found.census, found.validation_census, split, *kept]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"split_ratio": 0.5},
    {"split_by": "id"},
    {"require_positive_query": True},
]


@pytest.mark.long
def test_a_second_opening_reads_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path)
    first = [_opened(store, **o) for o in OPTIONS]
    assert all(a != b for a, b in pairwise(first))  # each has its own
    with monkeypatch.context() as patch:
        readers = [(data, "census"), (data, "runs_read"), (data, "require_scores")]
        for module, name in (*readers, (split, "_write_split"), (pools, "_from_store")):
            patch.setattr(module, name, lambda *_: pytest.fail("read again"))
        assert [_opened(store, **o) for o in OPTIONS] == first
    commit(store, [candidate(40, 0, [7], correct=1, score=1.0)], name="b")
    assert _opened(store)[3] == [7, *first[0][3]]  # another run is another question


def test_a_coarser_order_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store(tmp_path)
    asked = {"view": ["all_candidates"], "query_embeddings": str(tmp_path / "v.npy")}
    config = TrainConfig.model_validate({"data": asked})
    whole = open_data(Source(store=store.path), config)
    assert "shuffle" not in whole.provenance
    assert not any("shuffled" in line for line in describe_data(whole))
    monkeypatch.setattr(snapshot, "LARGE", 0)
    coarse = open_data(Source(store=store.path), config)
    said = "128 stretches of 32,768 candidates at a time"
    assert coarse.provenance == whole.provenance | {"shuffle": said}
    assert f"the groups of an epoch are shuffled among {said}" in describe_data(coarse)
