"""The legacy trainer's own run, step by step: 3 RCE epochs, 2 GRPO epochs, and β."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lever_data.older import NAMES
from lever_train.learn import losses
from lever_train.learn.batch import Loader
from lever_train.learn.data import TrainingData, open_data
from lever_train.learn.distributed import World
from lever_train.learn.setup import frozen_copy, new_selector
from lever_train.learn.step import Learner, Phase, adapt_beta
from lever_train.learn.train import train
from lever_train.learn.validate import validate
from lever_train.options.resolve import resolve
from lever_train.options.train import Source, TrainConfig
from lever_train.selector.model import Selector
from tests.shared_data import GOLDEN, OKVQA, needs_shared
from tests.stores import candidate, commit, new_store
from tests.training import steps_of

FLAGS = {
    "data.query_embeddings": str(OKVQA / "train_question_embeddings.pt"),
    "data.split_ratio": 1.0,
    "data.order": "file",
    "run.tied_groups": "keep",
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.sft_checkpoint": str(GOLDEN / "trajectory_init.v3.pt"),
    "rce.epochs": 3,
    "grpo.epochs": 2,
    "grpo.topk_baseline": "subset",
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "trajectory_expected.json").read_text())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    store = new_store(tmp_path_factory.mktemp("trajectory"))
    legacy = json.loads((GOLDEN / "trajectory_rl_data.json").read_text())
    rows = [
        candidate(
            *(int(query), ordinal, c["pointer"]),
            **{NAMES.get(k, k): v for k, v in c.items() if k != "pointer"},
        )
        for query, value in legacy.items()
        for ordinal, c in enumerate(value["pointer_candidates"])
    ]
    commit(store, rows)
    return Source(store=store.path)


def _close(found: list[float], wanted: list[float]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_shared
def test_rce_through_the_whole_trainer(
    source: Source, expected: dict[str, Any], tmp_path: Path
) -> None:
    import polars as pl

    config = resolve(None, FLAGS | {"grpo.epochs": 0})
    train(source, tmp_path / "out", config)
    table = pl.read_parquet(tmp_path / "out" / "metrics.parquet")
    _close(steps_of(table, "rce", "loss"), expected["losses"]["rce"])


@pytest.mark.slow
@needs_shared
def test_every_step_of_both_stages_and_beta(
    source: Source, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among candidates of equal reward the legacy top-k takes whatever torch.topk gives for the
    unpadded group, and so does this test; ours takes the lower ordinal."""
    monkeypatch.setattr(losses, "top_k_mask", _legacy_pick)
    config = resolve(None, FLAGS)
    data = open_data(source, config)
    selector, config = new_selector(config, 384, lambda line: None)
    loader = Loader(data, torch.device("cpu"), batch_size=1)
    sft = frozen_copy(selector)
    walk = _Walk(config, data, loader, selector)
    wanted = expected["losses"]
    rce = Learner(Phase("rce", 0, 3), selector, loader, config, steps=3 * 24)
    for epoch in range(3):
        for batch in walk.batches():
            walk.note(rce.step(batch, len(walk.losses)))
        _close([walk.validation()], wanted["val"][epoch : epoch + 1])
    _close(walk.losses, wanted["rce"])
    walk.losses, beta = [], 0.1
    phase = Phase("grpo", 1, 2, 3)
    grpo = Learner(phase, selector, loader, config, steps=2 * 24, reference=sft)
    for epoch in range(2):
        for batch in walk.batches():
            figures = grpo.step(batch, len(walk.losses), epoch=epoch, beta=beta)
            walk.note(figures)
            walk.betas.append(beta)
            beta = adapt_beta(figures["kl"], beta)
        _close([walk.validation()], wanted["val"][3 + epoch : 4 + epoch])
    _close(walk.losses, wanted["grpo"])
    _close(walk.kls, wanted["grpo_kl"])
    _close(walk.betas, wanted["kl_beta"])


@pytest.mark.slow
@needs_shared
def test_reference_log_probabilities(source: Source, expected: dict[str, Any]) -> None:
    config = resolve(None, FLAGS)
    data = open_data(source, config)
    selector, _ = new_selector(config, 384, lambda line: None)
    loader = Loader(data, torch.device("cpu"), batch_size=24)
    [batch] = loader.batches(data.train, order="file")
    steps = selector.steps(*loader.vectors(batch), batch.positions, batch.step_mask)
    for row, query in enumerate(batch.query.tolist()):
        wanted = expected["old_log_probs"][str(query)]
        _close(steps.sequence_log_prob()[row][batch.mask[row]].tolist(), wanted)
    assert data.pools.ids.tolist() == expected["candidate_indices"]  # type: ignore[union-attr]


def _legacy_pick(rewards: Tensor, mask: Tensor, k: int | None) -> Tensor:
    if k is None or k >= int(mask.sum()):
        return mask
    return torch.zeros_like(mask).scatter(1, rewards.topk(k, dim=-1).indices, True)


class _Walk:
    def __init__(
        self, config: TrainConfig, data: TrainingData, loader: Loader, selector: Selector
    ) -> None:
        self.config, self.data, self.loader, self.selector = config, data, loader, selector
        self.losses: list[float] = []
        self.kls: list[float] = []
        self.betas: list[float] = []

    def batches(self) -> Any:
        return self.loader.batches(self.data.train, order="file")

    def note(self, figures: dict[str, float]) -> None:
        self.losses.append(figures["loss"])
        if "kl" in figures:
            self.kls.append(figures["kl"])

    def validation(self) -> float:
        """RCE loss at τ 1 over the same queries, as the legacy run was validated."""
        everything = replace(self.data.train)
        found = validate(self.selector, self.loader, everything, self.config, World())
        return found["val_loss"]
