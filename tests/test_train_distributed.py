"""Two processes under torchrun: the same result as one, every query once an epoch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from lever_data.sources.transfer import transfer
from lever_data.store.store import Store
from tests.cloud import TestBucket
from tests.training import Bench, equal, steps_of

FLAGS: dict[str, Any] = {
    "rce_epochs": 2,
    "grpo_epochs": 1,
    "batch_size": 5,  # 32 groups: the last batch has two, one for each process
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "threads": 1,
}


def _by_two(bench: Bench, out: str, store: object, launcher: Sequence[str] = ()) -> None:
    """Train by two processes, each started by the launcher where one is given."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words += [*launcher, "-m", "lever_cli", "train", "--store", str(store)]
    words += ["--out", str(bench.folder / out)]
    for name, value in bench.flags(**FLAGS).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_two_processes_are_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.train("one", **FLAGS)
    _by_two(bench, "two", bench.store.path)
    for name in ("rce_epoch2.pt", "grpo_epoch1.pt"):
        one, two = bench.tensors("one", name), bench.tensors("two", name)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    for phase in ("rce", "grpo"):
        for metric in ("groups", "tied", "weight"):
            found = steps_of(bench.metrics("two"), phase, metric)
            assert found == steps_of(bench.metrics("one"), phase, metric)
    epochs = [bench.metrics(out).filter(pl.col("step").is_null()) for out in ("one", "two")]
    assert (
        epochs[0]
        .select("phase", "epoch", "metric")
        .equals(epochs[1].select("phase", "epoch", "metric"))
    )
    gap = (epochs[0]["value"] - epochs[1]["value"]).abs().max()
    assert isinstance(gap, float) and gap < 1e-3


@pytest.mark.long
def test_each_rank_reads_a_bucket_through_a_cache_of_its_own(
    bucket: TestBucket, tmp_path: Path
) -> None:
    """As two machines would that share nothing else: every figure is that of a store on disk."""
    bench = Bench(tmp_path)
    list(transfer(bench.store, Store.create(bucket.uri)))
    places: dict[str, object] = {"disk": bench.store.path, "bucket": bucket.uri}
    for out, store in places.items():
        own = f'LEVER_CACHE={tmp_path}/{out}-$LOCAL_RANK exec "$@"'
        _by_two(bench, out, store, ["--no-python", "sh", "-c", own, "sh", sys.executable])
    for rank in range(2):
        assert len(list((tmp_path / f"bucket-{rank}" / "mirror" / "s3").iterdir())) == 1
        assert list((tmp_path / f"bucket-{rank}").rglob("candidates/*.parquet"))
    assert bench.metrics("disk").equals(bench.metrics("bucket"))
    assert equal(*(bench.tensors(out, "grpo_epoch1.pt") for out in places))
