"""Export gives back what was ingested: for every generation, spelling, order and unknown key."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from lever_data.sources.export import export
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions, Reader
from lever_data.store.store import Run, Store
from tests.commands import lever
from tests.legacy_strategies import (
    Json,
    beam_files,
    difference,
    null_non_finite,
    rl_files,
    texts,
)
from tests.stores import candidate, commit, commit_examples, new_store

SLOW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def round_trip(text: bytes, folder: Path) -> Any:
    source, out = folder / "in.json", folder / "out.json"
    source.write_bytes(text)
    store = Store.create(folder / "store")
    (done,) = ingest([source], store, IngestOptions(dataset="d", split="train"))
    export(store, done.run.run, out)
    return json.loads(out.read_bytes())


@pytest.mark.slow
@SLOW
@given(texts(rl_files()))
def test_rl_data_comes_back_equal(case: tuple[Json, bytes]) -> None:
    file, text = case
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(text, Path(folder))
    assert difference(back, null_non_finite(file)) is None


@pytest.mark.long
@SLOW
@given(texts(beam_files()))
def test_beam_data_comes_back_equal(case: tuple[Json, bytes]) -> None:
    file, text = case
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(text, Path(folder))
    assert difference(back, null_non_finite(file)) is None


def rollout(store: Store, **columns: Any) -> Run:
    row = candidate(
        4,
        0,
        [9, 8],
        eval_mode="file",
        correct=1,
        score=0.6,
        eval_failed=False,
        scorer="m",
        policy="p",
        shot_scores=[
            {
                "shot": 1,
                "correct": 0,
                "score": 0.0,
                "expected_score": None,
                "answer": "a",
                "eval_mode": "file",
            }
        ],
        **columns,
    )
    failed = candidate(4, 1, [8, 9], eval_failed=True, error="timed out", scorer="m")
    return commit(store, [row, failed], kind="rollout")


def test_a_rollout_becomes_a_file_that_comes_back_as_the_same_rows(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = rollout(store, extra='{"note": 1}')
    done = lever("export", "--store", store.path, "--run", run.run, "--out", tmp_path / "r.json")
    assert done.stdout.split()[-4:-1] == [run.run, "1", "2"]
    file = json.loads((tmp_path / "r.json").read_bytes())
    assert file["_meta"]["vqa_model"] == "m"
    first, second = file["4"]["pointer_candidates"]
    assert first["vqa_eval_mode"] == "file"
    assert first["note"] == 1
    assert second["error"] == "timed out"
    assert second["vqa_acc_score"] is None
    (back,) = ingest([tmp_path / "r.json"], store, IngestOptions(dataset="d", split="train"))
    found, stored = (
        [pq.read_table(f, partitioning=None).to_pylist() for f in r.table_files("candidates")]
        for r in (back.run, run)
    )
    for row in (*found[0], *stored[0]):
        row["extra"] = {k: v for k, v in json.loads(row["extra"] or "{}").items() if k[0] != "_"}
    assert found == stored


@pytest.mark.parametrize("reader", ["notes", "newest"])
def test_a_file_for_a_state_of_the_legacy_code_is_as_that_state_reads_it(
    tmp_path: Path, reader: Literal["notes", "newest"]
) -> None:
    failed = {"pointer": [1], "pointer_global": [8], "vqa_eval_mode": "error", "vqa_correct": 0}
    scored = {"pointer": [1, 0], "pointer_global": [8, 9], "vqa_eval_mode": "vqaEval"}
    query = {"candidate_pool_ids": [9, 8], "pointer_candidates": [scored, failed]}
    (tmp_path / "in.json").write_text(json.dumps({"_meta": {"a": 1}, "4": query}))
    store = Store.create(tmp_path / "store")
    (done,) = ingest([tmp_path / "in.json"], store, IngestOptions(dataset="d", split="train"))
    lever(
        *("export", "--store", store.path, "--run", done.run.run),
        *("--for", reader, "--out", tmp_path / "out.json"),
    )
    file = json.loads((tmp_path / "out.json").read_bytes())
    assert ("_meta" in file) == (reader == "newest")
    first, second = file["4"]["pointer_candidates"]
    assert (first["pointer"], first["vqa_eval_mode"]) == ([8, 9], "file")
    assert second["pointer"] == [8]
    assert second["vqa_eval_mode"] == ("error" if reader == "newest" else "fallback")
    if reader == "notes":
        assert (second["vqa_pred_answer"], second["vqa_acc_score"]) == ("", 0.0)
    for record in (first, second):  # either key would give `pointer` another meaning
        assert record.keys().isdisjoint({"pointer_pos", "pointer_global", "candidate_pool_ids"})


def _read_as_notes(file: Json) -> list[tuple[int, list[int], float]]:
    """What the state of the notes reads: every key is a query, fallback rows are skipped ones."""
    return [
        (int(key), c["pointer"], c["vqa_correct"] + c["vqa_acc_score"])
        for key, value in file.items()
        for c in value["pointer_candidates"]
        if c["vqa_eval_mode"] != "fallback"
    ]


def _read_as_newest(file: Json) -> list[tuple[int, list[int], float]]:
    """What the newest state reads: `_` keys and errors are skipped, pointer_pos goes first."""
    return [
        (int(key), c.get("pointer_pos", c["pointer"]), c["vqa_correct"] + c["vqa_acc_score"])
        for key, value in file.items()
        if not key.startswith("_")
        for c in value["pointer_candidates"]
        if c["vqa_eval_mode"] not in ("error", "fallback")
    ]


def _sources() -> dict[str, Json]:
    """The same three rows, as every generation writes them; the last one failed."""
    scores: Json = {"vqa_correct": 1, "vqa_acc_score": 0.6}
    failed: Json = {"vqa_correct": 0, "vqa_acc_score": 0.0}
    pool = [9, 8, 5]
    rows = [([8, 9], [1, 0], scores), ([5, 8], [2, 1], scores), ([9, 5], [0, 2], failed)]

    def mode(row: Json, spelled: str) -> Json:
        return row | {"vqa_eval_mode": "error" if row is failed else spelled}

    v2 = [{"pointer": p, **mode(s, "file")} for p, _, s in rows]
    v4 = [{"pointer": p, "pointer_pos": at, **mode(s, "vqaEval")} for p, at, s in rows]
    k64 = [{"pointer": at, "pointer_global": p, **mode(s, "vqaEval")} for p, at, s in rows]
    return {
        "v2": {"4": {"pointer_candidates": v2}},
        "v4": {
            "_meta": {"vqa_model": "m"},
            "4": {"candidate_pool_indices": pool, "pointer_candidates": v4},
        },
        "k64": {"4": {"candidate_pool_ids": pool, "pointer_candidates": k64}},
    }


@pytest.mark.parametrize("generation", ["v2", "v4", "k64"])
def test_each_state_reads_the_pointers_that_its_file_means(tmp_path: Path, generation: str) -> None:
    (tmp_path / "in.json").write_text(json.dumps(_sources()[generation]))
    store = Store.create(tmp_path / "store")
    (done,) = ingest([tmp_path / "in.json"], store, IngestOptions(dataset="d", split="train"))
    expected = [(4, [8, 9], 1.6), (4, [5, 8], 1.6)]
    for reader, read in (("notes", _read_as_notes), ("newest", _read_as_newest)):
        out = tmp_path / f"{reader}.json"
        export(store, done.run.run, out, reader=cast(Reader, reader))
        assert read(json.loads(out.read_bytes())) == expected, reader


def test_several_scorers_stand_with_their_rows(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [candidate(1, 0, [2], scorer="a"), candidate(1, 1, [3], scorer="b")]
    run = commit(store, rows, kind="rescore")
    export(store, run.run, tmp_path / "r.json")
    file = json.loads((tmp_path / "r.json").read_bytes())
    assert "vqa_model" not in file["_meta"]
    assert [c["scorer"] for c in file["1"]["pointer_candidates"]] == ["a", "b"]


def test_a_name_that_ends_in_gz_is_compressed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = rollout(store)
    export(store, run.run, tmp_path / "a.json.gz")
    export(store, run.run, tmp_path / "a.json")
    packed, plain = (tmp_path / "a.json.gz").read_bytes(), (tmp_path / "a.json").read_bytes()
    assert gzip.decompress(packed) == plain
    export(store, run.run, tmp_path / "a.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == packed


def test_what_cannot_be_exported_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = rollout(store)
    where = ("--store", store.path, "--run", run.run, "--out")
    failed = lever("export", *where, tmp_path / "none" / "x.json", check=False)
    assert "there is no such folder to write to" in failed.stderr
    (path,) = run.table_files("candidates")
    path.write_bytes(path.read_bytes()[:-100])
    failed = lever("export", *where, tmp_path / "x.json", check=False)
    assert failed.returncode == 1
    assert str(path) in failed.stderr
    assert "Hint: " in failed.stderr
    assert list(tmp_path.glob("*x.json*")) == []


def test_only_rl_data_and_beams_have_a_legacy_form(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit_examples(
        store,
        [{"dataset": "d", "split": "train", "example_id": 0, "question_id": 1, "question": "?"}],
    )
    failed = lever(
        "export", "--store", store.path, "--run", run.run, "--out", tmp_path / "x", check=False
    )
    assert failed.returncode == 2
    assert "Error: a run of kind examples has no legacy JSON form" in failed.stderr
