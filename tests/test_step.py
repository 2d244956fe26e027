"""A step of training: its optimizer, and the features that wait for it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.features import make_store
from lever_train.learn.batch import Loader
from lever_train.learn.data import open_data
from lever_train.learn.losses import group_weights
from lever_train.options.train import Source


@pytest.mark.long
def test_the_optimizer_is_torchs_without_what_compiles() -> None:
    """The same weights and state, to the bit, and ``torch._dynamo`` is never imported."""
    code = """
import sys, torch
from lever_train.learn.step import AdamW

def train(kind):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(5))]
    for _ in range(2):
        optimizer = kind(weights, lr=0.1, weight_decay=0.05, fused=True)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            (weights[0] @ weights[1]).square().sum().backward()
            optimizer.step()
        state = optimizer.state_dict()
        optimizer = kind(weights, lr=0.1, fused=True)
        optimizer.load_state_dict(state)
        optimizer.step()  # with the last gradient
    return weights + [value for part in state["state"].values() for value in part.values()]

ours = train(AdamW)
assert "torch._dynamo" not in sys.modules
theirs = train(torch.optim.AdamW)
assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and len(ours) == 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
def test_features_are_read_for_the_groups_that_teach(tmp_path: Path) -> None:
    config = make_store(tmp_path, 90)
    data = open_data(Source(store=tmp_path / "store"), config)
    loader = Loader(data, torch.device("cpu"), batch_size=64)
    weigh = partial(group_weights, stage="dense", config=config)
    every = list(loader.batches(data.train))
    some = list(loader.batches(data.train, weigh=weigh))
    assert [len(batch) for batch in every] == [len(batch) for batch in some] == [64, 26]
    for whole, part in zip(every, some, strict=True):
        teaches = weigh(part) > 0
        assert 0 < int(teaches.sum()) < len(part)
        assert whole.features is not None and part.features is not None
        assert whole.features.shape[1:] == (64, 9 + 64) and bool(whole.features.any())
        assert torch.equal(part.features[teaches], whole.features[teaches])
        assert not part.features[~teaches].any()
        query, pool = loader.vectors(part.select(teaches.nonzero().squeeze(1)))
        assert pool.features is not None and len(query) == len(pool.features)
