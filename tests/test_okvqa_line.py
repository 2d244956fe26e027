"""The straight line on the real data, by the commands a user types."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lever_train.learn.data import open_data
from lever_train.options.resolve import resolve
from lever_train.options.train import Source
from tests import commands
from tests.shared_data import OKVQA, needs_shared

pytestmark = [needs_shared, pytest.mark.long, pytest.mark.timeout(600)]

BIG = OKVQA / "rl_data_TextSimSampler_NearestDemo.json.gz"
V4 = OKVQA / "rl_data_v4_strict_400.json"
PLAIN = OKVQA / "rl_data_no_eval_mode_800.json"
VECTORS = OKVQA / "train_question_embeddings.pt"
POOL = OKVQA / "train_pool64_text_sim.npy"
Candidates = list[dict[str, Any]]


def _beam_file() -> Path:
    (path,) = OKVQA.glob("vqa-okvqa-*.json")
    return path


def lever(*words: object, both: bool = False) -> str:
    """What a command prints: stdout, or both streams."""
    done = commands.lever(*words)
    return done.stdout + done.stderr if both else done.stdout


def _read(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("okvqa") / "S"
    where = ("--store", made, "--dataset", "okvqa", "--split")
    lever("ingest", BIG, *where, "train")
    for split in ("train", "val"):
        questions = OKVQA / f"OpenEnded_mscoco_{split}2014_questions.json.gz"
        annotations = OKVQA / f"mscoco_{split}2014_annotations.json.gz"
        lever("ingest", questions, annotations, *where, split)
        lever("ingest", OKVQA / f"{split}_question_embeddings.pt", *where, split)
    return made


def _count(store: Path, sql: str, *words: object) -> int:
    rows = json.loads(lever("query", sql, "--store", store, "--format", "json", *words))
    return int(rows[0]["n"])


def _run_id(store: Path, rows: int) -> str:
    runs = json.loads(lever("runs", "--store", store, "--json", "-"))
    (found,) = [r["run"] for r in runs if r["rows"] == rows and r["kind"] in ("rl_data", "beam")]
    return str(found)


def _right(candidates: Candidates) -> set[int]:
    return {c["vqa_correct"] for c in candidates}


def _rewards(candidates: Candidates) -> set[float]:
    return {c["vqa_correct"] + c["vqa_acc_score"] for c in candidates}


BY_ROW: dict[str, Callable[[dict[str, Any]], bool]] = {
    "all_candidates": lambda c: True,
    "beam": lambda c: c["gen_method"] == "beam",
    "beam_sample": lambda c: c["gen_method"] in ("beam", "sample"),
}
BY_QUERY: dict[str, Callable[[Candidates], bool]] = {
    "balanced": lambda group: _right(group) == {0, 1},
    "positive": lambda group: 1 in _right(group),
    "learnable": lambda group: len(_rewards(group)) > 1,
}


def test_every_training_view_agrees_with_a_count_over_the_json(store: Path) -> None:
    groups = [value["pointer_candidates"] for value in _read(BIG).values()]
    rows = [c for group in groups for c in group]
    expected = {}
    for view, keep in BY_ROW.items():
        expected[view] = sum(map(keep, rows))
        expected[f"{view}_file_only"] = sum(
            keep(c) and c["vqa_eval_mode"] != "fallback" for c in rows
        )
    for view, keep_group in BY_QUERY.items():
        expected[view] = sum(len(group) for group in groups if keep_group(group))
    found = {view: _count(store, f"select count(*) as n from {view}") for view in expected}
    assert found == expected
    assert expected["all_candidates"] == 88_827


def test_candidates_two_runs_hold_are_counted_once(store: Path) -> None:
    big = _run_id(store, 88_827)
    lever("ingest", V4, "--store", store, "--dataset", "okvqa", "--split", "train")
    all_rows = "select count(*) as n from all_candidates"
    assert _count(store, all_rows) == 88_827
    assert _count(store, all_rows, "--run", big) == 88_827
    assert _count(store, all_rows, "--run", _run_id(store, 3_826)) == 3_826


def test_the_same_source_again_changes_nothing(store: Path) -> None:
    before = lever("runs", "--store", store, "--json", "-")
    where = ("--store", store, "--dataset", "okvqa", "--split", "train")
    said = lever("ingest", BIG, *where, both=True)
    assert "already ingested as " + _run_id(store, 88_827) in said
    assert lever("runs", "--store", store, "--json", "-") == before


def test_export_equals_the_source_for_every_kind(store: Path, tmp_path: Path) -> None:
    where = ("--store", store, "--dataset", "okvqa", "--split", "train")
    lever("ingest", PLAIN, V4, _beam_file(), *where)
    sources = {88_827: BIG, 3_826: V4, 7_886: PLAIN, 4_000: _beam_file()}
    for rows, source in sources.items():
        out = tmp_path / f"{rows}.json"
        lever("export", "--store", store, "--run", _run_id(store, rows), "--out", out)
        assert _read(out) == _read(source), source.name


def test_all_queries_are_trained_on(store: Path) -> None:
    """What is trained on, without the training."""
    given = {"query_embeddings": str(VECTORS), "pool": str(POOL), "split_ratio": 1.0}
    given |= {"view": ["beam_sample_file_only"]}
    config = resolve(None, {f"data.{name}": value for name, value in given.items()})
    source = Source(store=store, runs=(_run_id(store, 88_827),))
    assert open_data(source, config).census.groups == 9_009


def test_training_on_all_queries_trains_on_every_group(store: Path, tmp_path: Path) -> None:
    big = _run_id(store, 88_827)
    out = tmp_path / "CK"
    data = ("--query-embeddings", VECTORS, "--pool", POOL, "--split-ratio", "1.0")
    options = ("--tied-groups", "keep", "--rce-epochs", 1, "--batch-size", 128, "--seed", 0)
    size = ("--hidden-dim", 32)  # what is counted does not depend on it

    view = ("--view", "beam_sample_file_only")
    said = lever(
        *("train", "--store", store, "--run", big, *view, *data, *options, *size, "--out", out),
        both=True,
    )
    match = re.search(r"([\d,]+) groups in [\d.]+ s: [\d,]+ queries/s", said)
    assert match, said
    assert int(match[1].replace(",", "")) == 9_009
    lever("convert", out / "rce_epoch1.pt")
    assert (out / "rce_epoch1_v2format.ckpt").exists()
