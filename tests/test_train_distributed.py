"""Two processes under torchrun: the same result as one, every query once an epoch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tests.training import Bench, steps_of

FLAGS: dict[str, Any] = {
    "rce_epochs": 2,
    "grpo_epochs": 1,
    "batch_size": 5,  # 32 groups: the last batch has two, one for each process
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "threads": 1,
}


@pytest.mark.long
def test_two_processes_are_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.train("one", **FLAGS)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words += ["-m", "lever_cli", "train", "--store", str(bench.store.path)]
    words += ["--out", str(tmp_path / "two")]
    for name, value in bench.flags(**FLAGS).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
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
