"""`lever pack` and what it makes: picks of `lever eval`, in a program that has no store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard, constants

from lever_data.errors import LeverError, UsageError
from lever_data.store.schema import EVALUATIONS, EXAMPLES
from lever_data.store.store import RunSpec, Store
from lever_train import load
from lever_train.embed.embed import embed
from lever_train.evaluate.baselines import greedy
from lever_train.flow.similar import similar_pools
from lever_train.options.embed import EmbedRequest
from lever_train.options.pack import PackRequest
from lever_train.options.rollout import Recipe
from lever_train.options.train import ModelConfig
from lever_train.pack import cells
from lever_train.pack.near import largest
from lever_train.pack.pack import pack
from lever_train.pack.packed import PackedSelector
from lever_train.rollout.policy import load_policy
from lever_train.rollout.propose import Ask, propose
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.kinds import make_selector
from tests.cases import long
from tests.commands import lever
from tests.encoders import QUESTIONS, tiny_clip
from tests.stores import commit_examples, new_store, table

N, D, K = 60, 16, 12


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    found = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    found[7] = found[3]  # equal similarity: the earlier example counts as nearer
    return found


def checkpoint(folder: Path, kind: str, dim: int = D) -> Path:
    torch.manual_seed(1)
    selector = make_selector(dim, ModelConfig(selector=kind, hidden=8, num_heads=2))
    path = folder / f"{kind}.pt"
    save_v3(path, selector, Progress(3, "rce", 0.0, {}))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, vectors: torch.Tensor) -> Path:
    """A store of N examples, their vectors, and a checkpoint of two kinds."""
    folder = tmp_path_factory.mktemp("pack")
    commit_examples(
        new_store(folder),
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": 100 + i,
             "image_id": i, "question": f"what is {i}?", "answers": [str(i)], "answer": str(i)}
            for i in range(N)
        ],
    )  # fmt: skip
    np.save(folder / "vectors.npy", vectors.numpy())
    for kind in ("static", "gated", "stop"):
        checkpoint(folder, kind)
    return folder


def packed(place: Path, out: Path, kind: str = "static", **more: Any) -> PackedSelector:
    given: dict[str, Any] = {"candidate_embeddings": str(place / "vectors.npy"), "pool_size": K}
    given |= more
    checkpoint = place / f"{kind}.pt"
    request = PackRequest(checkpoint=checkpoint, out=out, store=place / "store", **given)
    return load(pack(request))


def evaluated(place: Path, kind: str, queries: torch.Tensor, pools: np.ndarray, k: int) -> Any:
    ask = Ask(np.arange(len(queries)), queries, torch.from_numpy(np.load(place / "vectors.npy")),
              pools.astype(np.int64), False)  # fmt: skip
    found = greedy(load_policy(place / f"{kind}.pt", "cpu"), ask, k)
    return [[e for e in row if e >= 0] for row in found.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [long("static"), "gated"])
def test_picks_are_those_of_an_evaluation(
    place: Path,
    tmp_path: Path,
    vectors: torch.Tensor,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lever_train.pack.packed._QUERIES", 7)  # scored at once
    monkeypatch.setattr("lever_train.pack.packed._BLOCK", 16)  # of a thread
    selector = packed(place, tmp_path / "p", kind)
    queries = torch.cat([torch.randn(40, D), vectors[3:4]])
    pools = similar_pools(queries, vectors, K, leave_out_self=False)
    for k in (1, 4):
        found = selector.select(queries.numpy(), k)
        assert [[p.id for p in row] for row in found] == evaluated(place, kind, queries, pools, k)
    one = selector.select(queries[0].numpy(), 3)
    assert [p.id for p in one] == [p.id for p in selector.select(queries.numpy(), 4)[0]][:3]
    assert one[0].example["question"] == f"what is {one[0].id}?"
    given = np.stack([np.random.default_rng(i).permutation(N)[:K] for i in range(len(queries))])
    given[:, -1] = -1  # a shorter pool
    found = selector.select(queries, 2, pools=given)
    assert [[p.id for p in row] for row in found] == evaluated(place, kind, queries, given, 2)


@pytest.mark.long  # of fewer questions none is stopped where it matters
def test_threads_that_ask_different_pools_get_their_own(place: Path, tmp_path: Path) -> None:
    selector, rng = packed(place, tmp_path / "p", "static"), np.random.default_rng(0)
    pools = [rng.permutation(N)[:K][None] for _ in range(2)]
    asked = [(torch.randn(D), pools[n // 3 % 2]) for n in range(900)]

    def ask(one: tuple[torch.Tensor, np.ndarray]) -> list[int]:
        return [pick.id for pick in selector.select(one[0], 2, pools=one[1])]

    alone, interval = [ask(one) for one in asked], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that one is stopped between any two of its steps
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(ask, asked)) == alone
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [long("static"), "gated"])
def test_log_probabilities_are_of_each_step(place: Path, tmp_path: Path, kind: str) -> None:
    selector = packed(place, tmp_path / "p", kind)
    query = torch.randn(1, D)
    pool = np.arange(6)[None]
    table = torch.from_numpy(np.load(place / "vectors.npy"))
    policy = load_policy(place / f"{kind}.pt", "cpu")
    for k in (1, 2, 6):
        recipe = Recipe(shot_num=k, num_beams=1, temps=(), num_random=0)
        whole = propose(policy, Ask(np.arange(1), query, table, pool, False), recipe)
        steps = [pick.log_prob for pick in selector.select(query, k, pools=pool)[0]]
        assert sum(steps) == pytest.approx(float(whole.log_prob[0]), abs=1e-5)
    assert steps[-1] == pytest.approx(0)  # only one is left
    assert all(step <= 0 for step in steps)


@pytest.mark.long
def test_a_stop_selector_stops_by_itself(place: Path, tmp_path: Path) -> None:
    selector = packed(place, tmp_path / "p", "stop")
    queries = torch.randn(30, D)
    pools = similar_pools(
        queries, torch.from_numpy(np.load(place / "vectors.npy")), K, leave_out_self=False
    )
    found = selector.select(queries)
    limit = ModelConfig().max_shots
    assert [[p.id for p in row] for row in found] == evaluated(place, "stop", queries, pools, limit)
    # asked for two it shows two, also where it would rather end after one
    end = selector._policy.selector.get_parameter("stop_token")
    end.data.copy_(selector._policy.selector.get_parameter("query_proj.weight")[:1])
    for k in (1, 2, 4):
        found = selector.select(queries, k)
        assert all(len(row) == k for row in found)
        assert all(np.isfinite([pick.log_prob for pick in row]).all() for row in found)
    with pytest.raises(UsageError, match="does not stop by itself"):
        packed(place, tmp_path / "q").select(queries)


@pytest.mark.slow
def test_examples_are_added_without_training(
    place: Path, tmp_path: Path, vectors: torch.Tensor
) -> None:
    selector = packed(place, tmp_path / "p")
    query = torch.randn(D)
    fresh = {"example_id": 1000, "question": "new?", "answer": "yes"}
    larger = selector.add_examples([fresh], query[None])
    found = [p.id for p in larger.select(query, K)]
    assert 1000 in found and 1000 not in [p.id for p in selector.select(query, K)]
    assert next(p for p in larger.select(query, K) if p.id == 1000).example["answer"] == "yes"
    for examples, rows, why in (
        ([fresh | {"example_id": 5}], query[None], "of this id already"),
        ([fresh, fresh], torch.zeros(2, D), "of this id already"),
        ([{"question": "?"}], query[None], "needs an example_id"),
        ([fresh | {"colour": 1}], query[None], "a field that the pack has not"),
        ([fresh], query[None, :5], "width 16"),
        ([fresh], torch.zeros(2, D), "a vector an example"),
        ([fresh], None, "names no encoder"),
        ([fresh | {"question": 5}], query[None], "an example does not fit the others"),
        ([fresh | {"example_id": 2**70}], query[None], "an example does not fit the others"),
    ):
        with pytest.raises(UsageError, match=why):
            selector.add_examples(examples, rows)
    assert selector.select(np.zeros((0, D)), 2) == selector.select([], 2) == []
    assert selector.add_examples([fresh | {"example_id": np.int64(1000)}], query[None])
    assert selector.select(query.clone().requires_grad_(), 1)


@pytest.mark.slow
def test_of_equally_similar_examples_the_lower_id_is_nearer(place: Path, tmp_path: Path) -> None:
    """Also where it was added later: a pool of one holds the lower id."""
    selector, query = packed(place, tmp_path / "p", pool_size=1), torch.randn(D)
    for first, second in ((1000, 500), (500, 1000)):
        rows = [{"example_id": n, "question": str(n)} for n in (first, second)]
        larger = selector.add_examples(rows[:1], 2 * query[None])
        larger = larger.add_examples(rows[1:], 2 * query[None])
        (pick,) = larger.select(query, 1)
        assert (pick.id, pick.example["question"]) == (500, "500")


@pytest.mark.slow
def test_what_cannot_be_asked_is_said(place: Path, tmp_path: Path) -> None:
    selector = packed(place, tmp_path / "p")
    bad = np.full((1, D), np.nan)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (np.zeros((2, D + 1)), {}, "width 16"),
        (bad, {}, "NaN"),
        ("a text", {}, "names no encoder"),
        ([[0.0] * D, [0.0]], {}, "vectors are numbers, equally many in each"),
        ([["a"] * D], {}, "vectors are numbers"),
        (["a", 0.0], {}, "vectors are numbers"),
        (np.full(D, 1e300), {}, "infinity"),
        (None, {}, "vectors are wanted|width 16"),
        (np.zeros(D), {"k": 1.5}, "k is from 1 to 12"),
        (np.zeros(D), {"k": K + 1}, "k is from 1 to 12"),
        (np.zeros(D), {"k": 0}, "k is from 1"),
        (np.zeros((2, D)), {"pools": [[1, 2]]}, "a row a question"),
        (np.zeros(D), {"pools": [[1, -1]], "k": 2}, "fewer demonstrations"),
        (np.zeros(D), {"pools": [[1, 999]]}, "does not hold"),
        (np.zeros(D), {"pools": [[1, 2, 1]]}, "an example twice"),
        (np.zeros(D), {"pools": [[1.7, 2.0]]}, "which are integers"),
    ]
    for inputs, more, why in cases:
        with pytest.raises((UsageError, LeverError), match=why):
            selector.select(inputs, **({"k": 1} | more))
    with pytest.raises(UsageError, match="there already"):
        packed(place, tmp_path / "p")


@pytest.mark.long
def test_a_pack_of_other_vectors_is_refused(place: Path, tmp_path: Path) -> None:
    for name, shape in (("short", (N - 1, D)), ("wide", (N, D + 1))):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=shape))
    for name in ("short", "wide"):
        with pytest.raises(LeverError, match="not those of the examples"):
            packed(place, tmp_path / "p", candidate_embeddings=str(tmp_path / f"{name}.npy"))
    assert not list(tmp_path.glob(".p*")) and not (tmp_path / "p").exists()


@pytest.mark.slow
def test_a_pack_that_was_changed_is_refused(place: Path, tmp_path: Path) -> None:
    packed(place, tmp_path / "p")
    with pytest.raises(LeverError, match="no packed selector"):
        load(tmp_path)
    (tmp_path / "p" / "pool.parquet").write_bytes(b"")
    with pytest.raises(LeverError, match="not the one that was packed"):
        load(tmp_path / "p")
    said = json.loads((tmp_path / "p" / "config.json").read_text())
    for text, why in (
        ('{"model_type": "lever_selector", "format": 99}', "the pack is of another format"),
        ('{"model_type": "llama"}', "a model for another task; at .*; value 'llama'"),
        ("[]", "a model for another task"),
        (json.dumps(said | {"files": {}}), "the pack's configuration lacks an entry"),
        (json.dumps({n: v for n, v in said.items() if n != "encoder"}), "lacks an entry"),
    ):
        (tmp_path / "p" / "config.json").write_text(text)
        with pytest.raises(LeverError, match=why):
            load(tmp_path / "p")


@pytest.mark.slow
def test_a_hub_holds_the_folder_as_it_stands(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of the hub's cache; the card is one of the hub's."""
    query = torch.ones(D)
    expected = [pick.id for pick in packed(place, tmp_path / "p").select(query, 3)]
    cached = tmp_path / "hub" / "models--me--selector"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "p", cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [pick.id for pick in load("hub:me/selector").select(query, 3)] == expected
    card = ModelCard.load(cached / "snapshots" / ("a" * 40) / "README.md")
    assert card.data.library_name == "lever" and "demonstration-selection" in card.data.tags
    for name in ("hub:me/other", "hub:not a name"):
        with pytest.raises(LeverError, match="the hub does not give this selector"):
            load(name)


@pytest.mark.long
def test_texts_are_embedded_in_the_words_of_the_vectors(tmp_path: Path) -> None:
    """A template's fields are those of the items that are asked about."""
    store, encoder = new_store(tmp_path), tiny_clip(tmp_path / "clip")
    commit_examples(
        store,
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": i, "question": text,
             "answers": ["who uses"], "answer": "who uses"}
            for i, text in enumerate(QUESTIONS)
        ],
    )  # fmt: skip
    words = {"features": "text", "template": "{question} {answer}", "name": "both"}
    embed(EmbedRequest(store=store.path, encoder=str(encoder), **words))
    request = PackRequest(
        checkpoint=checkpoint(tmp_path, "static", 6),
        out=tmp_path / "p",
        store=store.path,
        candidate_embeddings="both",
    )
    selector = load(pack(request))
    item = {"question": QUESTIONS[2], "answer": "who uses"}
    for asked in (item, [item]):
        found, expected = selector.select(asked, 3), selector.select(selector.vectors[2], 3)
        found = found[0] if asked == [item] else found
        assert [p.id for p in found] == [p.id for p in expected]
        assert [p.log_prob for p in found] == pytest.approx(
            [p.log_prob for p in expected], abs=1e-4
        )
    with pytest.raises(UsageError, match="an item has no 'answer'"):
        selector.select(QUESTIONS[2], 2)


@pytest.mark.parametrize(("size", "count"), [(5, 5), (40, 3), (300, 7), (900, 56), (900, 57)])
@pytest.mark.parametrize("values", [0, 1, 3, 1000])
def test_the_nearest_are_those_of_a_whole_sort(size: int, count: int, values: int) -> None:
    """Of equally similar examples the earlier, whatever looks at few of them finds."""
    rng = np.random.default_rng(size + values)
    near = rng.integers(0, values + 1, (4, size)) / 1000 + rng.uniform(-4e-7, 4e-7, (4, size))
    rows = rng.permutation(size)
    rounded = (torch.from_numpy(near).float() * 10**6).round().numpy()
    expected = [rows[np.lexsort((rows, -line))][:count].tolist() for line in rounded]
    assert largest(torch.from_numpy(near).float(), rows, count).tolist() == expected


@pytest.mark.long
def test_cells_hold_the_nearest_of_clustered_examples(place: Path, tmp_path: Path) -> None:
    """Examples in the cells that a query looks through are found in the order of a whole search."""
    whole, fast = packed(place, tmp_path / "p"), packed(place, tmp_path / "q", cells=True)
    queries = torch.randn(20, D)
    assert fast.cells is not None and len(fast.cells.centres) == 15 < cells.PROBES
    for one, other in ((whole, fast), *(
        [s.add_examples([{"example_id": 1000}], torch.ones(1, D)) for s in (whole, fast)],
    )):  # fmt: skip
        found, expected = other.select(queries, 4), one.select(queries, 4)
        assert [[p.id for p in row] for row in found] == [[p.id for p in row] for row in expected]
    units = torch.nn.functional.normalize(whole.vectors, dim=-1)
    assert 3 in looked_at(fast.cells, units[3], 1)


def test_few_cells_are_enough_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "PROBES", 1)
    units = torch.nn.functional.normalize(torch.randn(400, D), dim=-1)
    made = cells.Cells.of(units)
    for count in (1, 50, 400):
        rows = looked_at(made, units[0], count)
        assert count <= len(rows) == len(set(rows))
    assert 0 in looked_at(made, units[0], 1) and len(looked_at(made, units[0], 1)) < 100


def looked_at(made: cells.Cells, unit: torch.Tensor, count: int) -> list[int]:
    return [row for part in made.near(unit, count) for row in made.order[part].tolist()]


@pytest.mark.long
def test_the_card_has_the_figures_and_their_run(place: Path, tmp_path: Path) -> None:
    store = Store.open(place / "store")
    name = load_policy(place / "gated.pt", "cpu").name
    rows = [
        {"dataset": "d", "split": "val", "query_id": q, "selector": s, "shots": 1, "pointer": [1],
         "accuracy": a, "correct": int(a > 0), "scorer": "m", "metric": "1"}
        for q, s, a in [(0, "g", 1.0), (0, "nearest", 0.0), (1, "g", 0.6), (1, "nearest", 0.3)]
    ]  # fmt: skip
    spec = RunSpec(
        "evaluation", "d", "val", source_sha256="e", parameters={"selectors": {"g": name}}
    )
    with store.begin(spec) as writer:
        writer.write("evaluations", table(EVALUATIONS, rows))
        run = writer.commit()
    packed(place, tmp_path / "p", "gated")
    card = (tmp_path / "p" / "README.md").read_text()
    assert f"| {run.run} | d/val | g | 1 | 2 | 0.8000 |" in card
    assert f"| {run.run} | d/val | nearest | 1 | 2 | 0.1500 |" in card
    packed(place, tmp_path / "q", "static")
    assert "No evaluation of this checkpoint" in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.long
def test_the_command_and_a_program_without_a_store(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    lever("pack", place / "static.pt", "--out", out, "--store", place / "store",
          "--candidate-embeddings", place / "vectors.npy")  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "pool.parquet",
    ]  # fmt: skip
    said = json.loads((out / "config.json").read_text())
    assert (said["pool_size"], said["task"]) == (64, "vqa")
    assert pq.read_schema(out / "pool.parquet").names[:4] == [*EXAMPLES.names[2:5], "question"]
    for kind in KINDS:
        checkpoint(tmp_path, kind)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out)], capture_output=True, text=True, check=True
    )
    alone, ids, loaded = done.stdout.splitlines()
    assert alone == "[]" and len(json.loads(ids)) == 2 and loaded == "[]"


KINDS = ("static", "gru", "gated", "decoder", "mmr", "additive", "bilinear", "stop", "features")
PROGRAM = f"""
import sys, numpy, lever_train
heavy = ["duckdb", "transformers", "polars", "typer", "torch._dynamo", "lever_data.store.store"]
print([m for m in [*heavy, "torch", "pyarrow", "pydantic"] if m in sys.modules])
print([p.id for p in lever_train.load(sys.argv[1]).select(numpy.ones({D}), 2)])
from lever_train.selector.checkpoint import load_selector
for kind in {KINDS}:
    load_selector(f"{{sys.argv[1]}}/../{{kind}}.pt")  # the shape of each is tried on
print([m for m in heavy if m in sys.modules])
"""
