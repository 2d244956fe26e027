"""``lever ingest``: each kind told by content, one run each, exact messages, nothing by halves."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.readers.vectors import read_vectors
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Run, Store
from tests.commands import lever

RL: dict[str, Any] = {
    "10": {"pointer_candidates": [{"pointer": [3, 1], "gen_method": "beam", "vqa_correct": 1}]},
    "2": {"pointer_candidates": [{"pointer": [4, 7], "vqa_acc_score": 0.6}, {"pointer": [7, 4]}]},
    "5": {"pointer_candidates": []},
}
BEAM = {"3": {"id_list": [[1, 2, 3], [2, 1, 3]], "score_list": [0.5, 0.25]}}
QUESTIONS = {
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 420, "image_id": 42, "question": "Which way?"},
        {"question_id": 70, "image_id": 7, "question": "Why?"},
    ],
}
ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {"question_id": 70, "answers": [{"answer": "so"}], "multiple_choice_answer": "because"},
        {"question_id": 420, "answers": [{"answer": a} for a in ("up", "on", "on", "up")]},
    ],
}


def write(folder: Path, name: str, value: object) -> Path:
    path = folder / name
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(text)
    return path


def rows(run: Run, table: str) -> list[dict[str, Any]]:
    return [row for path in run.table_files(table) for row in pq.read_table(path).to_pylist()]


def ingest_one(path: Path, store: Path, **options: Any) -> Run:
    (done,) = ingest(
        [path], Store.create(store), IngestOptions(dataset="d", split="train", **options)
    )
    return done.run


def test_rl_data_becomes_rows_in_order_of_query_and_candidate(tmp_path: Path) -> None:
    run = ingest_one(write(tmp_path, "a.json", RL), tmp_path / "s")
    found = [(r["query_id"], r["candidate"], r["pointer"]) for r in rows(run, "candidates")]
    assert found == [(2, 0, [4, 7]), (2, 1, [7, 4]), (10, 0, [3, 1])]
    assert [r["query_id"] for r in rows(run, "queries")] == [2, 5, 10]
    first = rows(run, "candidates")[0]
    assert first["score"] == 0.6
    assert first["gen_method"] is None
    assert first["shot_num"] == 2
    assert run.kind == "rl_data"


def test_the_command_prints_a_row_per_run_and_says_what_it_assumed(tmp_path: Path) -> None:
    source = write(tmp_path, "a.json", RL)
    done = lever("ingest", source, "--store", tmp_path / "s", "--json", "-")
    (row,) = json.loads(done.stdout)
    assert row["kind"] == "rl_data"
    assert row["rows"] == 3
    assert f"{source}: no --dataset given: assuming default" in done.stderr
    assert f"{source}: no --split given: assuming train" in done.stderr
    again = lever("ingest", source, "--store", tmp_path / "s", "--json", "-")
    assert json.loads(again.stdout) == [row]
    assert f"already ingested as {row['run']}; nothing changed" in again.stderr
    assert len(Store.open(tmp_path / "s").runs()) == 1


@pytest.mark.parametrize("form", ["gzip", "zstd", "two gzip members", "byte order mark"])
def test_compression_is_told_by_content_not_by_name(tmp_path: Path, form: str) -> None:
    text = json.dumps(RL).encode()
    forms: dict[str, Callable[[], bytes]] = {
        "gzip": lambda: gzip.compress(text),
        "zstd": lambda: pa.Codec("zstd").compress(text, asbytes=True),
        "two gzip members": lambda: gzip.compress(text[:50]) + gzip.compress(text[50:]),
        "byte order mark": lambda: b"\xef\xbb\xbf" + text,
    }
    run = ingest_one(write(tmp_path, "plain.json", forms[form]()), tmp_path / "s")
    assert run.rows == {"candidates": 3, "queries": 3}


def k64(**pool: Any) -> dict[str, Any]:
    record = {"pointer": [2, 0], "pointer_global": [107, 44], "vqa_correct": 0}
    return {"3": {**pool, "pointer_candidates": [record | {} for _ in range(2)]}}


@pytest.mark.parametrize("key", ["candidate_pool_ids", "candidate_pool_indices"])
def test_a_pointer_beside_its_ids_holds_positions(tmp_path: Path, key: str) -> None:
    file = k64(**{key: [44, 12, 107]})
    run = ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    first, _ = rows(run, "candidates")
    assert (first["pointer"], first["pointer_pos"]) == ([107, 44], [2, 0])
    assert rows(run, "queries")[0]["candidate_pool"] == [44, 12, 107]
    assert first["extra"] is None


def test_a_pointer_beside_the_pool_of_its_candidate_holds_positions(tmp_path: Path) -> None:
    file = {"3": {"pointer_candidates": [{"pointer": [1], "candidate_pool_ids": [8, 9]}]}}
    run = ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    (row,) = rows(run, "candidates")
    assert (row["pointer"], row["pointer_pos"]) == ([9], [1])
    assert rows(run, "queries")[0]["candidate_pool"] == [8, 9]


def test_pools_that_differ_are_refused_and_name_the_query(tmp_path: Path) -> None:
    file = k64(candidate_pool_ids=[44, 12, 107], candidate_pool_indices=[44])
    with pytest.raises(LeverError, match="the query has two pools that differ") as found:
        ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    assert "query '3'" in str(found.value.where)


def test_eval_modes_are_read_as_their_writers_meant(tmp_path: Path) -> None:
    modes = ["file", "vqaEval", "fallback", "simple_match", "error", None]
    candidates = [
        {"pointer": [i], "vqa_correct": 0, "vqa_eval_mode": m} for i, m in enumerate(modes)
    ]
    file = {"1": {"pointer_candidates": candidates}}
    run = ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    found = rows(run, "candidates")
    assert [r["eval_mode"] for r in found] == ["file", "file", "fallback", "fallback", None, None]
    assert [r["eval_failed"] for r in found] == [None, None, None, None, True, None]


def test_answers_may_be_objects(tmp_path: Path) -> None:
    answers = [{"answer": "up", "answer_id": 1}, "down"]
    file = {"1": {"query": {"gt_answers_raw": answers}, "pointer_candidates": []}}
    run = ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    assert rows(run, "queries")[0]["gt_answers"] == ["up", "down"]


@pytest.mark.parametrize("text", ['"beam_rank": 0.0', '"vqa_correct": true', '"vqa_correct": 1.0'])
def test_whole_numbers_as_pandas_writes_them_are_integers(tmp_path: Path, text: str) -> None:
    file = f'{{"0": {{"pointer_candidates": [{{"pointer": [1.0, 2], {text}}}]}}}}'
    run = ingest_one(write(tmp_path, "a.json", file.encode()), tmp_path / "s")
    (row,) = rows(run, "candidates")
    assert row["pointer"] == [1, 2]
    assert (row["beam_rank"], row["correct"]) in ((0, None), (None, 1))


def test_nan_and_infinity_are_null_and_counted(tmp_path: Path) -> None:
    text = (
        b'{"1": {"pointer_candidates": [{"pointer": [1], "beam_score": NaN, "temperature": 1e999},'
        b' {"pointer": [2], "beam_score": -Infinity, "vqa_pred_answer": "NaN"}]}}'
    )
    run = ingest_one(write(tmp_path, "a.json", text), tmp_path / "s")
    assert [r["beam_score"] for r in rows(run, "candidates")] == [None, None]
    assert [r["answer"] for r in rows(run, "candidates")] == [None, "NaN"]
    assert run.details["non_finite"] == {"beam_score": 2, "temperature": 1}


def test_many_nans_do_not_leave_the_fast_path_unequal(tmp_path: Path) -> None:
    tricky = '{\\"beam_score\\": NaN}, \\\\'
    one = f'{{"pointer": [1], "beam_score": NaN, "vqa_pred_answer": "{tricky}"}}'
    text = "{" + ", ".join(f'"{i}": {{"pointer_candidates": [{one}]}}' for i in range(500)) + "}"
    run = ingest_one(write(tmp_path, "a.json", text.encode()), tmp_path / "s")
    assert run.details["non_finite"] == {"beam_score": 500}
    assert {r["answer"] for r in rows(run, "candidates")} == {'{"beam_score": NaN}, \\'}


@pytest.mark.slow
def test_unknown_keys_can_be_asked_for_in_sql(tmp_path: Path) -> None:
    file = {"1": {"pointer_candidates": [{"pointer": [2], "note": "x", "deep": {"a": [1]}}]}}
    run = ingest_one(write(tmp_path, "a.json", file), tmp_path / "s")
    assert json.loads(rows(run, "candidates")[0]["extra"]) == {"note": "x", "deep": {"a": [1]}}
    sql = "select extra->>'$.note' as note, extra->>'$.deep.a[0]' as deep from all_candidates"
    lever("query", sql, "--store", tmp_path / "s", "--format", "json", "--out", tmp_path / "q")
    assert json.loads((tmp_path / "q").read_text()) == [{"note": "x", "deep": "1"}]


def test_the_scorer_is_the_model_that_meta_names(tmp_path: Path) -> None:
    late = {**RL, "_meta": {"vqa_model": "m", "note": 1}}
    run = ingest_one(write(tmp_path, "a.json", late), tmp_path / "s")
    assert {r["scorer"] for r in rows(run, "candidates")} == {"m"}
    assert run.details["top"] == {"_meta": {"vqa_model": "m", "note": 1}}
    assert run.rows["candidates"] == 3


def test_beams_leave_off_the_query_and_keep_their_rank(tmp_path: Path) -> None:
    run = ingest_one(write(tmp_path, "b.json", BEAM), tmp_path / "s")
    found = [(r["pointer"], r["beam_rank"], r["info_score"]) for r in rows(run, "candidates")]
    assert found == [([1, 2], 0, 0.5), ([2, 1], 1, 0.25)]
    assert run.kind == "beam"


def test_questions_and_annotations_become_examples_in_any_order(tmp_path: Path) -> None:
    questions = write(tmp_path, "q.json", QUESTIONS)
    annotations = write(tmp_path, "a.json", ANNOTATIONS)
    done = lever("ingest", annotations, questions, "--store", tmp_path / "s", "--json", "-")
    (row,) = json.loads(done.stdout)
    run = Store.open(tmp_path / "s").run(row["run"])
    assert (run.kind, run.split, run.num_rows) == ("examples", "val", 2)
    first, second = rows(run, "examples")
    assert first["image_path"] == "val2014/COCO_val2014_000000000042.jpg"
    assert (first["example_id"], first["question_id"], first["question"]) == (0, 420, "Which way?")
    assert first["answers"] == ["up", "on", "on", "up"]
    assert first["answer"] == "up"  # as frequent as "on", and before it
    assert second["answer"] == "because"


def test_questions_and_annotations_in_the_other_order_are_the_same_run(tmp_path: Path) -> None:
    pair = [write(tmp_path, "q.json", QUESTIONS), write(tmp_path, "a.json", ANNOTATIONS)]
    lever("ingest", *pair, "--store", tmp_path / "s")
    again = lever("ingest", *reversed(pair), "--store", tmp_path / "s")
    assert "already ingested" in again.stderr


def test_questions_alone_say_that_the_answers_are_missing(tmp_path: Path) -> None:
    questions = write(tmp_path, "q.json", QUESTIONS)
    done = lever("ingest", questions, "--store", tmp_path / "s")
    assert "no annotations given: answers null" in done.stderr


def test_annotations_alone_use_the_questions_of_the_store(tmp_path: Path) -> None:
    questions = write(tmp_path, "q.json", QUESTIONS)
    annotations = write(tmp_path, "a.json", ANNOTATIONS)
    store = tmp_path / "s"
    failed = lever("ingest", annotations, "--store", store, "--dataset", "d", check=False)
    assert failed.returncode == 2
    assert "the store has no questions of dataset d, split val" in failed.stderr
    assert "Hint: name the question file in the same command" in failed.stderr
    lever("ingest", questions, "--store", store, "--dataset", "d")
    (without,) = Store.open(store).runs()
    assert [r["answers"] for r in rows(without, "examples")] == [None, None]
    lever("ingest", annotations, "--store", store, "--dataset", "d")
    run = Store.open(store).runs()[-1]
    assert run.parents == (without.run,)
    assert [r["answer"] for r in rows(run, "examples")] == ["up", "because"]
    assert rows(run, "examples")[0]["image_path"] == "val2014/COCO_val2014_000000000042.jpg"


def test_annotations_of_other_questions_are_refused(tmp_path: Path) -> None:
    stranger = {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]}
    questions, annotations = (
        write(tmp_path, "q.json", QUESTIONS),
        write(tmp_path, "a.json", stranger),
    )
    failed = lever("ingest", questions, annotations, "--store", tmp_path / "s", check=False)
    assert failed.returncode == 1
    assert "1 of 1 annotations belong to no question" in failed.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("form", ["pt", "npy", "safetensors"])
def test_embeddings_of_every_form_hold_the_same_vectors(tmp_path: Path, form: str) -> None:
    values = np.arange(6, dtype=np.float16).reshape(3, 2) / 4
    path = tmp_path / f"vectors.{form}"
    if form == "pt":
        torch.save(torch.from_numpy(values), path)
    elif form == "npy":
        np.save(path, values)
    else:
        from safetensors.numpy import save_file

        save_file({"x": values}, str(path))
    run = ingest_one(path, tmp_path / "s")
    assert run.kind == "embeddings"
    assert [r["vector"] for r in rows(run, "embeddings")] == values.astype(float).tolist()
    assert [r["example_id"] for r in rows(run, "embeddings")] == [0, 1, 2]
    assert {r["name"] for r in rows(run, "embeddings")} == {"vectors"}


@pytest.mark.parametrize("by", ["torch.save", "np.save"])
def test_features_of_numpy_under_the_name_pth_are_vectors(tmp_path: Path, by: str) -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    with (tmp_path / "features.pth").open("wb") as file:
        torch.save(values, file) if by == "torch.save" else np.save(file, values)
    run = ingest_one(tmp_path / "features.pth", tmp_path / "s")
    assert [r["vector"] for r in rows(run, "embeddings")] == values.tolist()
    assert np.array_equal(read_vectors(tmp_path / "features.pth", "torch"), values)


def test_a_json_file_where_numpy_is_wanted_is_refused_without_unsafe_advice(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, "pool.npy", {"1": [2, 3]})
    with pytest.raises(LeverError, match=r"this is not a \.npy file") as found:
        read_vectors(path, "npy")
    assert "pickle" not in found.value.message()


def test_compressed_embeddings_are_unpacked_first(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[1.0, 2.0]]))
    packed = write(tmp_path, "w.npy.gz", gzip.compress((tmp_path / "v.npy").read_bytes()))
    run = ingest_one(packed, tmp_path / "s")
    assert [(r["name"], r["vector"]) for r in rows(run, "embeddings")] == [("w", [1.0, 2.0])]


def test_vectors_that_are_none_are_refused_by_row(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[1.0], [np.nan]]))
    failed = lever("ingest", tmp_path / "v.npy", "--store", tmp_path / "s", check=False)
    assert "a vector holds NaN, infinity or a number beyond float32; at" in failed.stderr
    assert "v.npy, row 1" in failed.stderr
    np.save(tmp_path / "pool.npy", np.zeros((3, 4), np.int16))
    failed = lever("ingest", tmp_path / "pool.npy", "--store", tmp_path / "s", check=False)
    assert "Hint: a table of candidate ids goes to `lever train --pool`" in failed.stderr
    np.save(tmp_path / "o.npy", np.array([[{}]]), allow_pickle=True)
    failed = lever("ingest", tmp_path / "o.npy", "--store", tmp_path / "s", check=False)
    assert "Python objects in dtype" in failed.stderr


def test_an_error_names_its_file_and_keeps_the_runs_before_it(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "good.json", RL), write(tmp_path, "bad.json", b'{"1": {"po')
    failed = lever("ingest", good, bad, good, "--store", tmp_path / "s", check=False)
    (run,) = Store.open(tmp_path / "s").runs()
    assert failed.returncode == 1
    assert f"committed before the error, and kept: {run.run}" in failed.stderr
    assert "Error: the file ends in the middle of a value: it was cut short" in failed.stderr
    assert f"at {bad}, byte 6;" in failed.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is not a kind lever knows"),
        (b"{}", "the JSON object is empty: it holds no queries"),
        (b"[1]", "the file is not a kind lever knows"),
        (b'{"_meta": {}}', "the file holds no queries"),
        (b'{"foo": 1}', "a JSON object, but of no kind lever knows"),
        (b"PK\x03\x04 nonsense", "this is not a torch file of the zip format"),
        (b'{"questions": []}', "the file holds no questions"),
        (b'{"\xff": 1}', "a JSON object, but of no kind lever knows"),
        (b'{"a": {"pointer_candidates": [', "the file ends in the middle of a value"),
    ],
)
def test_what_lever_does_not_know_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, "x.json", content)
    failed = lever("ingest", path, "--store", tmp_path / "s", check=False)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(("Error", "Hint"))
    assert f"Error: {message}" in failed.stderr
    assert str(path) in failed.stderr
    assert "b'" not in failed.stderr  # a file's text is shown as text
    assert not (tmp_path / "s").exists()


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    subprocess.run(["mkfifo", str(tmp_path / "pipe")], check=True)
    failed = lever("ingest", tmp_path / "pipe", "--store", tmp_path / "s", check=False)
    assert "lever ingests regular files" in failed.stderr
    failed = lever("ingest", tmp_path, "--store", tmp_path / "s", check=False)
    assert "the folder holds no Parquet or Arrow files" in failed.stderr
    failed = lever("ingest", tmp_path / "none", "--store", tmp_path / "s", check=False)
    assert "the file cannot be read (No such file or directory)" in failed.stderr


@pytest.mark.slow
def test_bytes_of_the_tables_do_not_depend_on_the_name_or_the_time(tmp_path: Path) -> None:
    first = ingest_one(write(tmp_path, "a.json", RL), tmp_path / "s")
    second = ingest_one(write(tmp_path, "b.json", RL), tmp_path / "t")
    assert first.run == second.run
    assert first.files == second.files


def test_the_data_set_is_asked_for_where_the_store_has_some(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text('{"0": {"pointer_candidates": [{"pointer": [1], "gen_method": "beam"}]}}')
    store = Store.create(tmp_path / "store")
    for _ in range(2):  # alone in its store it is called default, and stays so
        assert next(ingest([source], store)).run.dataset == "default"
    next(ingest([source], store, IngestOptions(dataset="okvqa", split="train")))
    with pytest.raises(UsageError, match="not named; value 'okvqa'") as caught:
        next(ingest([source], store))
    assert caught.value.hint == "--dataset NAME"
