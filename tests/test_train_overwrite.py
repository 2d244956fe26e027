"""`--overwrite`: the old training stays until the new one is there, whatever goes wrong."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.relations.stream import Selection
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.folder import TrainingFolder
from lever_train.learn.state import STATE
from tests.cases import long
from tests.torture.harness import Nursery, Outcome
from tests.training import POOL, QUERIES, WIDTH, Bench

NEW: dict[str, Any] = {"rce_epochs": 1, "seed": 1}
READING = "reading all data once before the training in"


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that is no half-written one."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"query_embeddings": "few.npy"}, "12 rows, none for a query"),
        long(
            {"candidate_embeddings": "few.npy", "pool": "all.npy"}, "12 rows, none for example 39"
        ),
        long({"pool": "pool.npy", "split_ratio": 0.99}, "the pool file pool.npy has 39 rows"),
        long({"pool": "empty.npy"}, "a pointer leaves the query's pool"),
        long({"shot_num": 3}, "a pointer has the wrong length: 2, not 3"),
        long({"reward": "if(query_id = 31, 'nan'::double, correct)"}, "not a finite number"),
        ({"reward": "if(query_id = 39, 'nan'::double, correct)"}, "not a finite number"),
        long({"reward": "1"}, "every group is tied"),
    ],
)
def test_faults_of_the_data_are_found_before_the_old_training_goes(
    trained: Bench, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    np.save(tmp_path / "few.npy", np.eye(POOL, WIDTH, dtype=np.float32) + 1)
    pools = np.tile(np.arange(QUERIES), (QUERIES - 1, 1))
    np.save(tmp_path / "pool.npy", pools)
    np.save(tmp_path / "all.npy", np.tile(np.arange(QUERIES), (QUERIES, 1)))
    np.save(tmp_path / "empty.npy", np.full((QUERIES, 1), -1))
    before = _contents(tmp_path / "out")
    files = {k: str(tmp_path / v) for k, v in flags.items() if str(v).endswith(".npy")}
    with pytest.raises(LeverError, match=message):
        trained.train(overwrite=True, **flags | files)
    assert _contents(tmp_path / "out") == before


@pytest.mark.long
def test_the_data_is_read_in_the_order_of_the_first_epoch(
    trained: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the shuffle can refuse, such as a seed, is found before the old training goes."""
    before = _contents(tmp_path / "out")
    orders: list[dict[str, Any]] = []
    batches = Loader.batches

    def noted(loader: Loader, selection: Selection, **position: Any) -> Iterator[Batch]:
        orders.append(position)
        if position.get("seed") == 2**63 - 1:
            raise LeverError("no order")
        return batches(loader, selection, **position)

    monkeypatch.setattr(Loader, "batches", noted)
    with pytest.raises(LeverError, match="no order"):
        trained.train(overwrite=True, seed=2**63 - 1)
    assert orders == [{"order": "random", "seed": 2**63 - 1}]
    assert _contents(tmp_path / "out") == before


@pytest.mark.long
def test_the_largest_seed_trains(tmp_path: Path) -> None:
    Bench(tmp_path).train(rce_epochs=1, seed=2**63 - 1)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 10**22])
def test_a_seed_that_is_none_is_refused_at_once(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UsageError, match=r"greater than or equal|less than or equal") as error:
        Bench(tmp_path).train(seed=seed)
    assert "--seed ([run] seed)" in str(error.value.where)


@pytest.mark.long
def test_data_is_read_beforehand_only_where_something_would_go(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.train(overwrite=True, rce_epochs=1)
    assert not [line for line in bench.said if line.startswith(READING)]
    bench.train(overwrite=True, **NEW)
    assert [line for line in bench.said if line.startswith(READING)]


@pytest.mark.long
def test_stopped_before_it_begins_it_replaces_nothing(trained: Bench, tmp_path: Path) -> None:
    before = _contents(tmp_path / "out")

    def stop(line: str) -> None:
        if line.startswith(READING):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained.train(overwrite=True, notify=stop, **NEW)
    assert _contents(tmp_path / "out") == before and trained.said[-1] == "stopped: it stays"


@pytest.mark.long
@pytest.mark.parametrize("long", [False, True])
def test_killed_at_any_change_one_of_the_two_is_whole(
    warm: Nursery, trained: Bench, tmp_path: Path, long: bool
) -> None:
    """Killed before every change of the file system (every sixth in the quick version), until the
    first step has been made."""
    bench, out = trained, tmp_path / "out"
    shutil.copytree(out, tmp_path / "old", symlinks=True)
    bench.train("new", **NEW)
    old, new = _contents(tmp_path / "old"), _contents(tmp_path / "new")
    assert old[STATE] != new[STATE]

    def train(word: str, **kill: int) -> Outcome:
        words = ["train", "--store", bench.store.path, "--out", out, "--threads", 1, word]
        for name, value in bench.flags(**NEW).items():
            words += [f"--{name.replace('_', '-')}", value]
        return warm.run(*map(str, words), **kill)  # type: ignore[arg-type]

    stayed = replaced = number = 0
    while replaced < (20 if long else 2):
        number += 1 if long else 6
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out, symlinks=True)
        assert train("--overwrite", kill_before=number).killed
        left = _contents(out)
        if left[STATE] == old[STATE]:
            assert left == old
            stayed += 1
            continue
        replaced += 1
        done = train("--resume")
        assert done.code == 0, done.stderr
        assert _contents(out).keys() == new.keys()
        assert torch.equal(*(_weights(folder) for folder in (out, tmp_path / "new")))
    assert stayed and replaced


def _weights(folder: Path) -> torch.Tensor:
    tensors = torch.load(folder / "last.pt", weights_only=True)["model_state_dict"]
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_a_state_that_names_other_files_deletes_none_of_them(
    trained: Bench, tmp_path: Path
) -> None:
    last = tmp_path / "out" / "rce_epoch2.pt"
    others = [tmp_path / "precious.pt", tmp_path / "out" / "notes.txt"]
    for path in others:
        path.write_text("mine")
    outputs = TrainingFolder(tmp_path / "out")
    outputs.delete(["../precious.pt", str(others[0]), "notes.txt", last.name])
    assert all(path.exists() for path in others)
    assert not last.exists()
