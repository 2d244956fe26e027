"""The training loop: files, options, what is refused, what is counted, every stage and selector."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import connect
from lever_train.learn.folder import TrainingFolder
from lever_train.options.resolve import resolve
from lever_train.options.train import Kind
from lever_train.selector.checkpoint import load_selector
from tests.cases import long, long_except
from tests.stores import candidate, commit
from tests.training import POOL, QUERIES, Bench, equal, random_rows, steps_of

TIED = [
    candidate(query, ordinal, [ordinal + 4, ordinal + 5], correct=0, score=0.0)
    for query in range(3)
    for ordinal in range(2)
]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.slow
def test_what_a_training_leaves(bench: Bench) -> None:
    result = bench.train()
    out = bench.folder / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "rce_epoch1.pt",
        "rce_epoch2.pt",
        "last.pt",
        "best.pt",
        "state.pt",
        "metrics.parquet",
        "curves.html",
        "config.toml",
        "provenance.json",
    }
    assert (out / "last.pt").readlink() == Path("rce_epoch2.pt")
    assert result.best.name == str((out / "best.pt").readlink())
    assert resolve(out / "config.toml", {}).model.hidden == 8
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["runs"] == [bench.run.run]
    assert "select" in provenance["views"]["all_candidates"]
    assert provenance["rows"] > 0 and provenance["queries"] == {"training": 32, "validation": 8}
    assert "data-chart=" in (out / "curves.html").read_text()
    assert "[GRPO] epochs=0, lr=1e-05, kl_beta_init=0.1: the RCE model is the result" in bench.said
    selector, checkpoint = load_selector(out / "rce_epoch2.pt")
    assert selector.config.hidden == 8 and checkpoint.phase == "rce"


@pytest.mark.long
def test_every_epoch_says_a_row_when_it_ends(bench: Bench) -> None:
    result = bench.train(rce_epochs=2, grpo_epochs=1)
    rows = [line for line in bench.said if "] epoch " in line]
    assert [row.split(":")[0] for row in rows] == [
        "[RCE] epoch 1/2",
        "[RCE] epoch 2/2",
        "[GRPO] epoch 1/1",
    ]
    for row, found in zip(rows, result.epochs, strict=True):
        assert f"  val_pick_accuracy {found['val_pick_accuracy']:.4f}  " in row
        assert (
            f"  ess {found['val_ess']:.4f}  " in row and f" loss {found['train_loss']:.4f}" in row
        )
        assert "  val_loss " in row and "  val_expected_reward " in row
    grpo = result.epochs[2]
    assert f"  kl {grpo['train_kl']:.4f}  beta {grpo['train_beta']:.4f}  " in rows[2]
    assert "  kl " not in rows[0]
    grpo_begins = next(i for i, line in enumerate(bench.said) if line.startswith("[GRPO] epochs"))
    assert bench.said.index(rows[1]) < grpo_begins  # while it trains, not at its end
    bench.train("all", split_ratio=1.0, rce_epochs=1)
    assert not any("val_loss" in line for line in bench.said if "] epoch " in line)


@pytest.mark.slow
def test_the_queries_of_a_view_are_held_out(bench: Bench) -> None:
    sql = "select dataset, split, query_id from all_candidates where query_id % 4 = 0"
    folder = bench.store.path / "views"
    folder.mkdir()
    (folder / "fourth.sql").write_text(sql)
    bench.train(held_out="fourth", rce_epochs=1)
    said = " ".join(bench.said)
    assert "training on 30 queries" in said and "validating on 10 queries" in said
    with pytest.raises(UsageError, match="no such view"):
        bench.train("other", held_out="fifth")
    with pytest.raises(UsageError, match="holds no query of this training"):
        bench.train("none", held_out="fold_0")  # the store has no questions


@pytest.mark.long
def test_metrics_are_a_relation_of_the_store(trained: Bench) -> None:
    bench = trained
    con = connect(bench.store)
    found = con.sql(
        "select metric, value from training_metrics where step is null and epoch = 2"
    ).fetchall()
    wanted = bench.metrics().filter(pl.col("step").is_null() & (pl.col("epoch") == 2))
    assert sorted(found) == sorted(wanted.select("metric", "value").rows())
    assert {"train_loss", "val_pick_accuracy", "val_oracle_accuracy", "val_ess"} <= {
        name for name, _ in found
    }
    bench.train("again")
    assert any("in the store already" in line for line in bench.said)


@pytest.mark.long
def test_one_seed_gives_one_result(bench: Bench) -> None:
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        bench.train(out, seed=seed, rce_epochs=1)
    assert equal(bench.tensors("a"), bench.tensors("b"))
    assert not equal(bench.tensors("a"), bench.tensors("c"))
    assert bench.metrics("a").equals(bench.metrics("b"))


@pytest.mark.long
def test_tied_groups_are_counted_and_skipped_kept_or_downweighted(bench: Bench) -> None:
    for policy in ("skip", "keep", "downweight"):
        bench.train(policy, tied_groups=policy, split_ratio=1.0)
    tables = {policy: bench.metrics(policy) for policy in ("skip", "keep", "downweight")}
    for table in tables.values():
        assert steps_of(table, "rce", "tied") == steps_of(tables["keep"], "rce", "tied")
    tied = sum(steps_of(tables["keep"], "rce", "tied")) / 2
    assert tied >= 14  # every third query has no reward at all
    groups = 40
    assert sum(steps_of(tables["skip"], "rce", "weight")) == 2 * (groups - tied)
    assert sum(steps_of(tables["keep"], "rce", "weight")) == 2 * groups
    downweighted = sum(steps_of(tables["downweight"], "rce", "weight"))
    assert downweighted == pytest.approx(2 * (groups - 0.9 * tied))
    assert any(f"{tied:.0f} of 40 groups tied" in line for line in bench.said)


@pytest.mark.slow
def test_a_batch_of_tied_groups_makes_no_step(tmp_path: Path) -> None:
    untied = [candidate(3, i, [i, i + 4], correct=i, score=0.0) for i in range(2)]
    bench = Bench(tmp_path, TIED + untied)
    bench.train(batch_size=1, split_ratio=1.0, rce_epochs=1, order="file")
    losses = steps_of(bench.metrics(), "rce", "loss")
    assert losses[:3] == [None] * 3 and losses[3] > 0


@pytest.mark.slow
def test_nothing_but_ties_is_an_error(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TIED)
    with pytest.raises(LeverError, match="every group is tied"):
        bench.train(split_ratio=1.0)
    bench.train("kept", split_ratio=1.0, tied_groups="keep")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        long("gru", {"rce_use_normalized_reward": True}),
        long("static", {"rce_rank": True}),
        long("gru", {"top1_only": True}),
        long("static", {"grpo_epochs": 2}),
        ("gru", {"grpo_epochs": 1, "advantage": "loo", "kl_estimator": "k2"}),
        long("static", {"grpo_epochs": 1, "topk_baseline": "subset", "reference": "rce"}),
        long("gru", {"rce_epochs": 0, "grpo_epochs": 1, "importance_cap": 2.0, "dual_clip": 3.0}),
        long("gru", {"grpo_epochs": 1, "freeze_backbone_in_grpo": True}),
    ],
)
def test_every_variant_trains(bench: Bench, flags: dict[str, Any], kind: str) -> None:
    result = bench.train(selector=kind, **{"rce_epochs": 1} | flags)
    assert all(np.isfinite(row["train_loss"]) for row in result.epochs)
    assert load_selector(result.last)[0].config.selector == kind


@pytest.mark.long
@pytest.mark.parametrize("kind", [k for k in get_args(Kind) if k not in ("static", "gru")])
def test_every_kind_trains(bench: Bench, kind: str) -> None:
    result = bench.train(selector=kind, rce_epochs=2, grpo_epochs=1, rce_lr=1e-2, num_layers=2)
    losses = [row["train_loss"] for row in result.epochs]
    assert np.isfinite(losses).all() and losses[1] < losses[0]
    found, _ = load_selector(result.last)
    assert found.config.selector == kind
    again = bench.train("again", selector=kind, sft_checkpoint=str(result.last), rce_epochs=1)
    assert np.isfinite(again.epochs[0]["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", long_except(["listwise", "hinge"], "listwise"))
def test_the_dense_stage_compares_the_candidates_of_a_query(bench: Bench, objective: str) -> None:
    result = bench.train(
        stage="dense",
        selector="features",
        dense_objective=objective,
        dense_epochs=4,
        dense_lr=3e-2,
        tied_groups="keep",
    )
    losses = [row["train_loss"] for row in result.epochs]
    assert losses[-1] < losses[0]
    assert result.last.name.startswith("dense_epoch")
    weights, groups = (steps_of(bench.metrics(), "dense", n) for n in ("weight", "groups"))
    assert sum(weights) < sum(groups)  # tied groups are left out, whatever is said of RCE


@pytest.mark.long
def test_single_demonstrations_are_compared_by_their_scores(tmp_path: Path) -> None:
    rows = [
        candidate(query, k, [query + 1 + k], correct=int(k == 1), score=float(k == 1))
        for query in range(8)
        for k in range(3)
    ]
    flags: dict[str, Any] = {"stage": "dense", "selector": "features"}
    flags["dense_objective"] = "pointwise"
    result = Bench(tmp_path / "singles", rows).train(dense_epochs=4, dense_lr=3e-2, **flags)
    losses = [row["train_loss"] for row in result.epochs]
    assert losses[-1] < losses[0]
    uneven = Bench(tmp_path / "uneven", rows[1:])  # a query with fewer candidates than the others
    assert len(uneven.train(dense_epochs=1, **flags).epochs) == 1
    rows[0]["pointer"] = [1, 2]  # of more by that of the last, but for a selector that can stop
    pairs = Bench(tmp_path / "pairs", rows)
    pairs.train(mixture=True, **flags)
    with pytest.raises(LeverError, match="of a selector that can stop compares single"):
        pairs.train("stops", can_stop=True, **flags)


@pytest.mark.long
def test_an_empty_pointer_is_a_candidate_where_the_selector_can_stop(tmp_path: Path) -> None:
    rows = [
        candidate(query, ordinal, pointer, correct=int(not pointer), score=0.0)
        for query in range(8)
        for ordinal, pointer in enumerate([[], [query + 1], [query + 1, query + 2]])
    ]
    bench = Bench(tmp_path, rows)
    flags: dict[str, Any] = {"selector": "features", "rce_epochs": 3, "rce_lr": 3e-2}
    with pytest.raises(LeverError, match="wrong length: 0, not at least 1"):
        bench.train("static", split_ratio=1.0, **flags)
    result = bench.train("stops", split_ratio=1.0, can_stop=True, max_shots=2, **flags)
    losses = [row["train_loss"] for row in result.epochs]
    assert losses[-1] < losses[0]
    with pytest.raises(LeverError, match="shows at most 1 demonstrations"):
        bench.train("short", split_ratio=1.0, can_stop=True, max_shots=1, **flags)


@pytest.mark.long
def test_grpo_keeps_the_rce_checkpoints_and_logs_its_parts(bench: Bench) -> None:
    bench.train(rce_epochs=1, grpo_epochs=2, kl_beta=0.15, grpo_lr=5e-6)
    assert "[GRPO] epochs=2, lr=5e-06, kl_beta_init=0.15" in bench.said
    assert not equal(bench.tensors("out", "rce_epoch1.pt"), bench.tensors("out", "grpo_epoch2.pt"))
    table = bench.metrics()
    names = set(table.filter(pl.col("phase") == "grpo")["metric"])
    assert {"ppo", "kl", "clipped_low", "clipped_high", "ratio_p05", "beta"} <= names
    assert {"ratio_p50", "ratio_p95", "advantage_rms", "gradient_norm", "tied"} <= names
    assert steps_of(table, "grpo", "beta")[0] == 0.15


@pytest.mark.long
def test_freezing_the_backbone_trains_the_attention_alone(bench: Bench) -> None:
    bench.train(rce_epochs=1, grpo_epochs=1, freeze_backbone_in_grpo=True)
    before, after = (bench.tensors("out", f"{p}_epoch1.pt") for p in ("rce", "grpo"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("cross_attn_layers.", "attn_norms.")) for name in moved)
    assert "frozen: input_proj.weight, query_proj.weight, cand_proj.weight" in bench.said


@pytest.mark.long
def test_pointers_of_many_lengths_train_together(tmp_path: Path) -> None:
    bench = Bench(tmp_path, random_rows(shots=(1, 2, 3, 4)))
    result = bench.train(tied_groups="keep", rce_epochs=1)
    assert np.isfinite(result.epochs[-1]["train_loss"])
    groups = {(r["query_id"], r["shot_num"]) for r in random_rows(shots=(1, 2, 3, 4))}
    assert result.epochs[-1]["groups"] == len({g for g in groups if g[0] < 32})
    with pytest.raises(LeverError, match="wrong length"):
        bench.train("two", shot_num=2)


@pytest.mark.long
def test_multi_shot_rewards_put_all_lengths_into_one_group(tmp_path: Path) -> None:
    rows = random_rows(shots=(2, 3))
    for row in rows:
        row["shot_scores"] = [
            {"shot": k, "correct": int(row["candidate"] == 0), "score": 0.3}
            for k in range(1, len(row["pointer"]) + 1)
        ]
    bench = Bench(tmp_path, rows)
    result = bench.train(reward_mode="multi_shot", view=["all_candidates"], rce_epochs=1)
    assert result.epochs[-1]["groups"] == 32
    rows[0]["shot_scores"] = rows[0]["shot_scores"][1:]
    broken = Bench(tmp_path / "broken", rows)
    with pytest.raises(LeverError, match=r"prefix|shot"):
        broken.train(reward_mode="multi_shot")


@pytest.mark.long
def test_several_views_are_interleaved(bench: Bench) -> None:
    both = bench.train(view=["beam", "all_candidates"], split_ratio=1.0, rce_epochs=1)
    alone = bench.train("one", view=["beam"], split_ratio=1.0, rce_epochs=1)
    assert both.epochs[0]["groups"] == alone.epochs[0]["groups"] + 40


@pytest.mark.long
def test_validation_and_pool_do_not_depend_on_filters(bench: Bench) -> None:
    bench.train("all", rce_epochs=1)
    beams: dict[str, Any] = {"gen_method": ["beam"], "skip_fallback": True}
    bench.train("beam", tied_groups="keep", rce_epochs=1, **beams)
    found = [
        json.loads((bench.folder / o / "provenance.json").read_text()) for o in ("all", "beam")
    ]
    assert found[0]["queries"] == found[1]["queries"]
    assert found[0]["pool"] == found[1]["pool"] == f"one shared pool of {POOL}"
    assert found[1]["dropped"]["gen_method"] > 0 and found[1]["dropped"]["fallback"] > 0
    assert any("queries emptied" in line for line in bench.said)


@pytest.mark.long
def test_the_split_by_hash_is_another_one_of_the_same_share(bench: Bench) -> None:
    bench.train("id", rce_epochs=1)
    bench.train("hash", split_by="hash", rce_epochs=1)
    by_id, by_hash = (
        json.loads((bench.folder / o / "provenance.json").read_text())["queries"]
        for o in ("id", "hash")
    )
    assert by_id == {"training": 32, "validation": 8}
    assert sum(by_hash.values()) == 40 and 1 <= by_hash["validation"] <= 20


@pytest.mark.long
def test_supervised_training_learns_the_best_beam(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        candidate(q, i, rng.permutation(POOL)[:2].tolist(), info_score=float(3 - i), beam_rank=i)
        for q in range(40)
        for i in range(4)
    ]
    bench = Bench(tmp_path, [])
    commit(bench.store, rows, kind="beam", name="beams")
    result = bench.train(
        stage="sft", view=["beam_infoscore"], sft_epochs=6, sft_lr=3e-3, batch_size=8
    )
    assert result.epochs[-1]["train_loss"] < result.epochs[0]["train_loss"]
    assert result.last.name == "sft_epoch6.pt"
    assert load_selector(result.last)[1].phase == "sft"


@pytest.mark.long
def test_training_from_a_checkpoint(bench: Bench) -> None:
    first = bench.train("sft", num_layers=2, rce_epochs=1)
    bench.train("next", sft_checkpoint=str(first.last), rce_epochs=1)
    assert any("tensors matched" in line for line in bench.said)
    assert len([k for k in bench.tensors("next") if k.endswith("in_proj_weight")]) == 2
    with pytest.raises(UsageError, match="has num_layers = 2, the config says 1"):
        bench.train("bad", sft_checkpoint=str(first.last), num_layers=1)


@pytest.mark.long
def test_an_output_folder_is_not_overwritten_by_accident(trained: Bench) -> None:
    with pytest.raises(UsageError, match="holds another training"):
        trained.train()
    trained.train(overwrite=True, rce_epochs=1)
    assert not (trained.folder / "out" / "rce_epoch2.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"view": ["nosuch"]}, "no such view"),
        ({"rce_epochs": 0}, "nothing to train"),
        long({"sft_checkpoint": "none.pt"}, "none.pt"),
        long({"query_embeddings": "none.pt"}, "no such embeddings file"),
        long({"pool": "none.npy"}, "none.npy"),
        long(
            {"num_layers": 0, "grpo_epochs": 1, "freeze_backbone_in_grpo": True},
            "nothing is left to train",
        ),
    ],
)
def test_a_refused_training_overwrites_nothing(
    trained: Bench, flags: dict[str, Any], message: str
) -> None:
    before = contents(trained.folder / "out")
    with pytest.raises(LeverError, match=message):
        trained.train(overwrite=True, **flags)
    assert contents(trained.folder / "out") == before
    with pytest.raises(LeverError, match=message):
        trained.train("fresh", **flags)
    assert not (trained.folder / "fresh").exists()


def test_overwriting_keeps_what_the_training_starts_from(trained: Bench) -> None:
    before = contents(trained.folder / "out")
    for name in ("rce_epoch1.pt", "best.pt"):
        start = str(trained.folder / "out" / name)
        with pytest.raises(UsageError, match="would delete the checkpoint"):
            trained.train(overwrite=True, sft_checkpoint=start)
    assert contents(trained.folder / "out") == before


def test_a_file_named_best_is_not_replaced_by_accident(bench: Bench) -> None:
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / "best.pt").write_bytes(b"another's")
    with pytest.raises(UsageError, match="holds another training"):
        bench.train()
    assert (bench.folder / "out" / "best.pt").read_bytes() == b"another's"
    (bench.folder / "file").touch()
    with pytest.raises(LeverError, match="cannot be made"):
        bench.train("file", overwrite=True)


def test_only_checkpoints_the_described_training_made_are_its_own(trained: Bench) -> None:
    outputs = TrainingFolder(trained.folder / "out")
    outputs.require_own()
    TrainingFolder(trained.folder / "nowhere").require_own()
    extra = outputs.out / "rce_epoch3.pt"  # it trained two epochs
    extra.touch()
    with pytest.raises(LeverError, match=r"did not make: rce_epoch3\.pt"):
        outputs.require_own()
    extra.unlink()
    (outputs.out / "provenance.json").unlink()
    with pytest.raises(LeverError, match=r"rce_epoch1\.pt, rce_epoch2\.pt") as error:
        outputs.require_own()
    assert "move them away" in str(error.value.hint)


def test_tensorboard_is_an_extra(bench: Bench) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UsageError, match="tensorboard is not installed") as error:
            bench.train(tensorboard=True)
        assert "lever[tensorboard]" in str(error.value.hint)
        assert not (bench.folder / "out").exists()
    else:
        bench.train(tensorboard=True)
        assert list((bench.folder / "out" / "tensorboard").iterdir())


TRACKIO = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")
def note(*call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**given):
    print("* Trackio project initialized")
    note("init", given["project"], given["name"], given["resume"], given["config"]["rce"]["epochs"])
def log(figures, step):
    note("log", figures, step)
def finish():
    note("finish")
"""


@pytest.mark.long
def test_trackio_is_told_every_step_once(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its calls; the package itself is an extra."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="trackio is not installed"):
        bench.train(trackio=True)
    monkeypatch.undo()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    bench.train(rce_epochs=2, grpo_epochs=1, trackio=True)
    text = (tmp_path / "lib" / "calls.jsonl").read_text()
    first, *logged, last = [json.loads(line) for line in text.splitlines()]
    assert (first, last) == (["init", "lever", "out", "never", 2], ["finish"])
    rows = bench.metrics()
    steps = [step for _, figures, step in logged if any("/step/" in name for name in figures)]
    assert steps == list(
        range(rows.filter(pl.col("metric") == "groups", ~pl.col("step").is_null()).height)
    )
    told = {(name, value) for _, figures, _ in logged for name, value in figures.items()}
    finite = rows.filter(pl.col("value").is_finite())
    kind = pl.when(pl.col("step").is_null()).then(pl.lit("epoch")).otherwise(pl.lit("step"))
    named = finite.select(pl.concat_str("phase", kind, "metric", separator="/"), "value")
    assert told == set(named.rows())
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_bfloat16_is_close(bench: Bench) -> None:
    """Products in bf16, scores and losses in float32."""
    flags: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "order": "file"}
    losses = [
        bench.train(precision, precision=precision, **flags).epochs[-1]["train_loss"]
        for precision in ("float32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


@pytest.mark.long
def test_only_queries_with_a_right_candidate(bench: Bench) -> None:
    """The split stays what it is; the queries that go are counted and said."""
    rows = random_rows()
    right = {row["query_id"] for row in rows if row["correct"]}
    bench.train(rce_epochs=1, require_positive_query=True)
    told = "\n".join(bench.said)
    trained = {q for q in right if q < 0.8 * QUERIES}
    assert f"training on {len(trained)} queries" in told
    assert f"{QUERIES - len(right)} queries have no right candidate: left out" in told
    bench.train("view", rce_epochs=1, view=["positive"])
    assert equal(bench.tensors("out"), bench.tensors("view"))
    with pytest.raises(UsageError, match="no query is left to train on") as error:
        Bench(bench.folder / "wrong", TIED).train(require_positive_query=True)
    assert "3 queries without a right candidate" in str(error.value.value)


@pytest.mark.long
def test_a_clamp_without_z_scores_is_refused(bench: Bench) -> None:
    with pytest.raises(UsageError, match="nothing is z-scored"):
        bench.train(normalize_clamp=3)
    bench.train(rce_epochs=1, normalize_clamp=0.5, rce_use_normalized_reward=True)
    bench.train("free", rce_epochs=1, rce_use_normalized_reward=True)
    assert not equal(bench.tensors("out"), bench.tensors("free"))
