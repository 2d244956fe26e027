"""`lever value`: estimates against the truth of worlds in which every pointer's reward is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_train.evaluate.value import Value, value
from lever_train.options.train import DataConfig, ModelConfig
from lever_train.options.value import ValueRequest
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Pool, Selector, StaticSelector
from tests.commands import lever
from tests.stores import candidate, commit, new_store

N, K, D, POLICIES = 120, 10, 8, 20
FIRST = N  # examples are of ids beyond the queries', so that none is its own


def _unit(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return found


class World:
    """N queries that share a pool of K; what is shown helps as it is similar, and by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(5)
        self.vectors = _unit(rng.normal(size=(FIRST + K, D))).astype(np.float32)
        similar = self.vectors[:N] @ self.vectors[FIRST:].T
        chance = 1 / (1 + np.exp(-(5 * similar + rng.normal(size=K) - 1)))
        self.reward = (rng.random((N, K)) < chance).astype(float)  # [N, K]
        np.save(folder / "vectors.npy", self.vectors)
        self.selectors = [self._selector(k) for k in range(POLICIES)]

    def _selector(self, k: int) -> Selector:
        """The k-th of 20, from one that shuns what is similar to one that seeks it."""
        torch.manual_seed(k)
        model = make_selector(D, ModelConfig(hidden=D, num_layers=0)).eval()
        assert isinstance(model, StaticSelector)
        share = 2 * k / (POLICIES - 1) - 1
        with torch.no_grad():
            model.query_proj.weight.copy_(share * torch.eye(D) + 0.3 * torch.randn(D, D))
            model.cand_proj.weight.copy_(torch.eye(D))
        save_v3(self.folder / f"{k}.pt", model, Progress(1, "rce", 0.0, {}))
        return model

    @torch.no_grad()
    def log_probs(self, k: int) -> np.ndarray:
        """Log-probabilities [N, K] of the first pick."""
        queries, pool = (torch.from_numpy(v) for v in (self.vectors[:N], self.vectors[FIRST:]))
        scores = self.selectors[k].begin(queries, Pool(pool)).scores()[:, 0]
        return scores.double().log_softmax(-1).numpy()

    def truth(self, k: int, shots: int = 1) -> float:
        """Mean over queries of the expected reward; a pointer's is the mean of its picks'."""
        log_p = self.log_probs(k)
        if shots == 1:
            return float((np.exp(log_p) * self.reward).sum(1).mean())
        total = np.zeros(N)
        p = np.exp(log_p)
        for a, b in permutations(range(K), 2):
            share = p[:, a] * p[:, b] / (1 - p[:, a])
            total += share * (self.reward[:, a] + self.reward[:, b]) / 2
        return float(total.mean())

    def request(
        self, rows: list[dict[str, Any]], chosen: Sequence[int] = range(POLICIES), **more: Any
    ) -> ValueRequest:
        """A request about a new store with these candidates."""
        folder = self.folder / f"store{len(list(self.folder.glob('store*')))}"
        commit(new_store(folder), rows)
        given: dict[str, Any] = {
            "checkpoints": tuple(self.folder / f"{k}.pt" for k in chosen),
            "store": folder / "store",
            "batch_size": N,
            "data": DataConfig(query_embeddings=str(self.folder / "vectors.npy")),
        }
        return ValueRequest(**given | more)

    def row(self, query: int, ordinal: int, picks: list[int], **more: Any) -> dict[str, Any]:
        score = float(np.mean([self.reward[query, pick] for pick in picks]))
        pointer = [FIRST + pick for pick in picks]
        right = int(score > 0)
        known = {"score": score, "correct": right, "gen_method": "random"}
        return candidate(query, ordinal, pointer, **known | more)


ACCURACY: dict[str, Any] = {"reward": {"mode": "soft_only", "soft_weight": 1.0}}


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("value"))


@pytest.mark.long
def test_vectors_of_another_width_and_a_device_that_is_not_there(
    world: World, tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(FIRST + K, D + 1)))
    request = world.request([world.row(0, 0, [1])], behaviour="uniform")
    wide = request.but(data=DataConfig(query_embeddings=str(tmp_path / "wide.npy")))
    with pytest.raises(LeverError, match=f"takes embeddings of width {D}, the embeddings have 9"):
        value(wide)
    with pytest.raises(UsageError, match="CUDA device"):
        value(request.but(device="cuda:7"))


@pytest.mark.slow
def test_with_all_pointers_stored_the_value_is_exact(world: World) -> None:
    rows = [world.row(q, i, [i]) for q in range(N) for i in range(K)]
    chosen = (0, 6, 13, 19)
    found = value(world.request(rows, chosen, behaviour="uniform", **ACCURACY))
    for k, one in zip(chosen, found, strict=True):
        assert one.snips.mean == pytest.approx(world.truth(k), abs=1e-5)
        assert one.doubly_robust.mean == pytest.approx(world.truth(k), abs=1e-5)
        assert one.support == pytest.approx(1, abs=1e-5)
        assert one.queries == N


@pytest.mark.long
def test_policies_are_ranked_from_some_of_the_pool(world: World) -> None:
    rng = np.random.default_rng(6)
    rows = [
        world.row(q, i, [int(pick)])
        for q in range(N)
        for i, pick in enumerate(rng.permutation(K)[:4])
    ]
    found = value(world.request(rows, behaviour="uniform", **ACCURACY))
    truth = [world.truth(k) for k in range(POLICIES)]
    for name in ("snips", "doubly_robust", "direct"):
        assert spearman([getattr(one, name).mean for one in found], truth) >= 0.9, name
    # within a query's four the weights add up to 1, which a lucky four does not: some bias is left
    errors = [abs(one.doubly_robust.mean - t) for one, t in zip(found, truth, strict=True)]
    assert np.mean(errors) < 0.06


@pytest.mark.long
def test_draws_are_weighed_by_how_likely_they_were(world: World) -> None:
    rng = np.random.default_rng(7)
    middle = POLICIES // 2
    log_p = torch.from_numpy(world.log_probs(middle) / 4).log_softmax(-1).numpy()  # at τ = 4
    rows = []
    for q in range(N):
        gumbels = log_p[q] - np.log(-np.log(rng.random((12, K))))
        for i, pick in enumerate(gumbels.argmax(1).tolist()):
            rows.append(
                world.row(q, i, [pick], logprob_score=float(log_p[q, pick]), gen_method="sample")
            )
    found = value(world.request(rows, **ACCURACY))
    naive = float(np.mean([row["score"] for row in rows]))
    truth = [world.truth(k) for k in range(POLICIES)]
    robust = [one.doubly_robust.mean for one in found]
    assert spearman(robust, truth) >= 0.9
    assert np.abs(np.subtract(robust, truth)).mean() < 0.3 * np.abs(naive - np.array(truth)).mean()
    assert all(0.7 < one.support < 1.3 for one in found)


@pytest.mark.long
def test_beams_are_no_draws(world: World) -> None:
    """The best there is does not tell how good a draw is."""
    log_p = world.log_probs(POLICIES // 2)
    samples = [
        world.row(q, i, [i], logprob_score=float(log_p[q, i]), gen_method="sample")
        for q in range(N)
        for i in (q % K, (q + 3) % K)
    ]
    beams = [
        world.row(q, 9, [int(log_p[q].argmax())], logprob_score=float(log_p[q].max()))
        | {"gen_method": "beam"}
        for q in range(N)
    ]
    more: dict[str, Any] = {"least_support": 0.0, **ACCURACY}
    alone, both = (
        value(world.request(rows, (0, 10, 19), **more)) for rows in (samples, samples + beams)
    )
    assert [one.snips for one in alone] == [one.snips for one in both]
    vectors = str(world.folder / "vectors.npy")
    data = DataConfig(query_embeddings=vectors, gen_method=("beam",))
    with pytest.raises(UsageError, match="beams were not drawn"):
        value(world.request(beams, (0,), data=data, **more))


@pytest.mark.long
def test_two_demonstrations(world: World) -> None:
    pairs = list(permutations(range(K), 2))
    rows = [world.row(q, i, list(pair)) for q in range(N) for i, pair in enumerate(pairs)]
    chosen = (4, 15)
    request = world.request(rows, chosen, behaviour="uniform", **ACCURACY)
    for k, one in zip(chosen, value(request), strict=True):
        assert one.snips.mean == pytest.approx(world.truth(k, 2), abs=1e-5)
        assert one.doubly_robust.mean == pytest.approx(world.truth(k, 2), abs=0.02)  # of 16 draws


@pytest.mark.long
def test_without_support_there_is_no_value(world: World) -> None:
    worst = [int(world.log_probs(POLICIES - 1)[q].argmin()) for q in range(N)]
    rows = [world.row(q, 0, [worst[q]]) for q in range(N)]
    request = world.request(rows, behaviour="uniform", **ACCURACY)
    with pytest.raises(LeverError, match=r"too little is stored.*19\.pt.*mean importance weight"):
        value(request)


@pytest.mark.long
def test_what_cannot_be_valued_is_said(world: World, tmp_path: Path) -> None:
    rows = [world.row(0, 0, [1]), world.row(0, 1, [2])]
    unknown = [row | {"gen_method": "sample"} for row in rows]
    with pytest.raises(UsageError, match="no candidate has a stored log-probability"):
        value(world.request(unknown, (0,)))
    with pytest.raises(UsageError, match="several"):
        value(world.request([*rows, world.row(0, 2, [1, 2])], (0,), behaviour="uniform"))
    torch.manual_seed(0)
    stop = make_selector(D, ModelConfig(selector="stop", hidden=D))
    save_v3(tmp_path / "stop.pt", stop, Progress(1, "rce", 0.0, {}))
    request = world.request(rows, behaviour="uniform", checkpoints=(tmp_path / "stop.pt",))
    with pytest.raises(UsageError, match="ends pointers by itself"):
        value(request)


@pytest.mark.long
def test_the_command(world: World) -> None:
    rows = [world.row(q, i, [i]) for q in range(30) for i in range(K)]
    request = world.request(rows)
    words = [
        "value", "--checkpoint", world.folder / "3.pt", "--store", request.store,
        "--query-embeddings", world.folder / "vectors.npy", "--behaviour", "uniform",
    ]  # fmt: skip
    assert "doubly robust" in lever(*words).stdout
    (found,) = json.loads(lever(*words, "--json", "-").stdout)
    assert set(found) == set(Value.__dataclass_fields__)
