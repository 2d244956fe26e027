"""Any data set in: JSON lines, CSV, Parquet, folders of `datasets`; what columns mean; tasks."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import ITEM_RELATIONS, Place, load_items
from lever_data.items.task import Task, stored_task
from lever_data.report.check import check
from lever_data.sources.dataset import meaning_of, read_dataset
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import Columns, IngestOptions
from lever_data.sources.item_file import example_batches
from lever_data.store.pictures import pictures_of
from lever_data.store.store import Store
from lever_train.options.rollout import Inputs, Request, Which
from lever_train.rollout.generate import generate
from tests.cloud import TestBucket
from tests.commands import lever

ROWS = [
    {"id": "004", "question": "Who sang?", "context": "Ann sang.", "answers": ["Ann", "Ann B."]},
    {"id": "7", "question": "Who, {now}?", "context": "Bo, then Cy.", "answers": ["Bo"]},
]


def json_lines(folder: Path) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


def zipped_csv(folder: Path) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "question", "context", "answers"])
    writer.writeheader()
    writer.writerows({**row, "answers": row["answers"][0]} for row in ROWS)
    (folder / "a.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    return folder / "a.csv.gz"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def saved_by_datasets(folder: Path) -> Path:
    """As `save_to_disk` of a DatasetDict lays it out: streams, with a list of files."""
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        (folder / "hf" / split).mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(folder / "hf" / split / "data-00000.arrow", table.schema) as file:
            file.write_table(table)
        state = {"_data_files": [{"filename": "data-00000.arrow"}], "_indices_data_files": None}
        (folder / "hf" / split / "state.json").write_text(json.dumps(state))
    splits = json.dumps({"splits": ["train", "validation"]})
    (folder / "hf" / "dataset_dict.json").write_text(splits)
    return folder / "hf"


def hub_folder(folder: Path) -> Path:
    (folder / "hub" / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        path = folder / "hub" / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder / "hub"


def put(folder: Path, path: Path, *, split: str = "train", **more: Any) -> tuple[Store, list[str]]:
    store, said = Store.create(folder / "store"), list[str]()
    options = IngestOptions(dataset="d", split=split, notice=said.append, **more)
    list(ingest([path], store, options))
    return store, said


@pytest.mark.parametrize("write", [json_lines, zipped_csv, parquet, saved_by_datasets, hub_folder])
def test_every_format_gives_the_same_items(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    store, said = put(tmp_path, write(tmp_path))
    assert "input = question, answers = answers, id = id, context = context; task qa" in said[0]
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
    assert [(i.question, i.answer, i.question_id) for i in items.values()] == [
        ("Who sang?", "Ann", "004"),
        ("Who, {now}?", "Bo", 7),
    ]
    assert [item.fields["context"] for item in items.values()] == [r["context"] for r in ROWS]
    task = stored_task(store.runs(), "d", "train")
    assert task == Task(name="qa").with_field("context")
    ((run, _),) = [(r.run, r) for r in store.runs()]
    again, _ = put(
        tmp_path, next(p for p in (tmp_path / "store").parent.iterdir() if p.name != "store")
    )
    assert [r.run for r in again.runs()] == [run]


def test_the_split_of_a_folder_is_the_one_asked_for(tmp_path: Path) -> None:
    path = saved_by_datasets(tmp_path)
    store, _ = put(tmp_path, path, split="val")
    assert len(load_items(connect(store, only=ITEM_RELATIONS), Place("d", "val"))) == 1
    with pytest.raises(UsageError, match="several splits"):
        put(tmp_path, path, split="dev2")


def one_row(folder: Path, row: dict[str, Any], **columns: Any) -> Any:
    path = folder / "row.jsonl"
    path.write_text(json.dumps(row))
    store, _ = put(folder, path, columns=Columns(**columns))
    (item,) = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train")).values()
    return item, stored_task(store.runs(), "d", "train")


def test_answers_of_squad_are_texts(tmp_path: Path) -> None:
    row = {"question": "?", "answers": {"text": ["a", "b", "a"], "answer_start": [1, 2, 1]}}
    item, _ = one_row(tmp_path, row)
    assert (item.answers, item.answer) == (("a", "b", "a"), "a")


@pytest.mark.parametrize(
    ("choices", "said", "answers"),
    [
        (["red", "blue"], 1, ("B", "blue")),
        (["red", "blue"], "blue", ("B", "blue")),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2", ("2", "blue")),
    ],
)
def test_choices_have_letters(
    tmp_path: Path, choices: Any, said: Any, answers: Sequence[str]
) -> None:
    row = {"question": "Which?", "choices": choices, "answerKey": said}
    item, task = one_row(tmp_path, row)
    assert (item.answers, item.answer) == (answers, answers[0])
    assert task.metric == "label" and "{question}\n{choices}\n" in task.query
    assert item.fields["choices"].splitlines()[1] == f"{answers[0]}. blue"


def test_labels_that_are_numbers_have_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["bad", "fair", "good"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["so so", "nice"], "label": [1, 2]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "l.parquet")
    store, said = put(tmp_path, tmp_path / "l.parquet")
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
    assert [item.answer for item in items.values()] == ["fair", "good"]
    assert "task choice, scored by label" in said[0]


@pytest.mark.slow
def test_an_empty_cell_is_no_answer(tmp_path: Path) -> None:
    """Else saying nothing would be right, and the word nan an answer."""
    (tmp_path / "c.csv").write_text("question,answer\nwho?,me\nwhy?,\n")
    numbers = pa.table({"question": ["who?", "why?"], "answer": [0.5, float("nan")]})
    pq.write_table(numbers, tmp_path / "f.parquet")
    for name, answer in (("c.csv", "me"), ("f.parquet", "0.5")):
        store, _ = put(tmp_path / name.partition(".")[2], tmp_path / name)
        items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
        assert [(i.answer, i.answers) for i in items.values()] == [(answer, (answer,)), (None, ())]


@pytest.mark.parametrize("name", ["c.csv", "f.parquet", "j.jsonl"])
def test_labels_that_pandas_made_floats(tmp_path: Path, name: str) -> None:
    """One missing label makes floats of all: what a model says is 1, and not 1.0."""
    labels, path = [1.0, None, 0.0, -1.0], tmp_path / name
    if name == "c.csv":
        path.write_text("text,label\n" + "".join(f"t,{'' if x is None else x}\n" for x in labels))
    elif name == "j.jsonl":
        path.write_text("".join(json.dumps({"text": "t", "label": x}) + "\n" for x in labels))
    else:
        pq.write_table(pa.table({"text": ["t"] * 4, "label": labels}), path)
    store, said = put(tmp_path, path)
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
    assert [item.answer for item in items.values()] == ["1", None, "0", "-1"]
    assert any("label holds integers as 1.0: read as 1" in line for line in said)


def test_numbers_that_are_no_integers_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,label\na,1.0\nb,1.5\n")
    (tmp_path / "j.jsonl").write_text('{"text": "a", "label": "1.0"}\n')
    for name, answers in (("c.csv", ["1.0", "1.5"]), ("j.jsonl", ["1.0"])):
        store, _ = put(tmp_path / name[0], tmp_path / name)
        items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
        assert [item.answer for item in items.values()] == answers


def test_a_label_without_a_name(tmp_path: Path) -> None:
    """-1 is what `datasets` writes where nobody knows the label: no answer, and not the word -1."""
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for name, labels in (("u", [-1, 0]), ("w", [0, 2])):
        table = pa.table({"text": ["so so", "nice"], "label": labels})
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
    store, _ = put(tmp_path, tmp_path / "u.parquet")
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train"))
    assert [(item.answer, item.answers) for item in items.values()] == [
        (None, ()),
        ("bad", ("bad",)),
    ]
    with pytest.raises(LeverError, match="has no name"):
        put(tmp_path, tmp_path / "w.parquet")


def test_pictures_inside_a_file_are_put_into_the_store(tmp_path: Path) -> None:
    pictures = []
    for shade in (0, 255):
        data = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(data, "PNG")
        pictures.append({"bytes": data.getvalue(), "path": None})
    table = pa.table({"image": pictures, "captions": [["a black tile", "black"], ["white"]]})
    pq.write_table(table, tmp_path / "c.parquet")
    store, said = put(tmp_path, tmp_path / "c.parquet")
    assert "task caption, scored by cider-d" in said[0]
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train", store.path))
    shades = [np.asarray(Image.open(str(item.image)))[0, 0, 0] for item in items.values()]
    assert shades == [0, 255]


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_a_file_with_a_broken_row_leaves_no_pictures(tmp_path: Path) -> None:
    good = {"image": {"bytes": picture(0), "path": None}, "caption": "a tile"}
    pq.write_table(pa.Table.from_pylist([good | {"id": "x"}] * 2), tmp_path / "c.parquet")
    with pytest.raises(LeverError, match="an id occurs twice"):
        put(tmp_path, tmp_path / "c.parquet")
    assert not (tmp_path / "store" / "images").exists()


@pytest.mark.slow
def test_check_looks_at_the_pictures_of_the_store(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(n), "path": None}, "caption": "x"} for n in (0, 9, 250)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    store, _ = put(tmp_path, tmp_path / "c.parquet")
    assert not check(store).problems
    broken, gone, _ = sorted((store.path / "images").iterdir())
    broken.write_bytes(picture(1))
    gone.unlink()
    problems = {p.where: p.what for p in check(store).problems}
    assert problems == {
        f"images/{broken.name}": "the picture is not the one that was ingested",
        f"images/{gone.name}": "the picture is missing",
    }


@pytest.mark.long
def test_pictures_of_a_store_in_a_bucket(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in it as in a folder, and are fetched where they are looked at."""
    rows = [{"image": {"bytes": picture(n), "path": None}, "caption": "x"} for n in range(70)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    place = ("--store", bucket.uri, "--dataset", "d", "--split", "train")
    lever("ingest", tmp_path / "c.parquet", *place)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    store = Store.open(bucket.uri)
    assert not check(store).problems and pictures_of(store.path) == store.path
    items = load_items(connect(store, only=ITEM_RELATIONS), Place("d", "train", store.path))
    shades = [np.asarray(Image.open(str(item.image)))[0, 0, 0] for item in items.values()]
    assert shades == list(range(70))
    name = sorted((store.path / "images").iterdir())[0].name
    bucket.put(f"images/{name}", b"another")
    assert not check(store).problems  # the copy here is whole
    monkeypatch.setenv("LEVER_VERIFY", "full")
    assert [p.where for p in check(store).problems] == [f"images/{name}"]
    with pytest.raises(LeverError, match="a picture is not what was put, in the bucket"):
        pictures_of(store.path)
    monkeypatch.setenv("LEVER_CACHE_SIZE", "0.001MB")
    with pytest.raises(LeverError, match="does not fit into the cache"):
        pictures_of(store.path)


@pytest.mark.long
def test_memory_holds_a_few_rows(tmp_path: Path) -> None:
    """What is read waits in a file: the columns are mapped, and no text of a row stays."""
    path, text = tmp_path / "a.jsonl", "x" * 2000
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"question": f"{number} {text}", "answer": "y"}) + "\n")
    meaning = meaning_of([path], Columns())
    read_dataset([path], meaning, tmp_path / "first")  # what it imports is held as well
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    items = read_dataset([path], meaning, tmp_path / "spill")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items.num_rows == 20_000 and items.columns["question"][19_999].as_py()[:6] == "19999 "
    # 40 MB of text in all; a batch of it, and the ids
    assert peak < 20e6 and pa.total_allocated_bytes() - before < 1e6
    for part in example_batches(items, None, ("d", "train"), items.numbers):
        assert part.num_rows and pa.total_allocated_bytes() - before < 10e6


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answers": "reply"}, "no such column"),
        ({"field": ("x",)}, "--field is NAME=COLUMN"),
        ({"answers": "id", "input": "x"}, "no such column"),
    ],
)
def test_a_mapping_that_does_not_fit(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        put(tmp_path, json_lines(tmp_path), columns=Columns(**columns))
    assert Store.create(tmp_path / "store").runs() == []


def test_columns_of_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('{"questions": [{"question_id": 1, "question": "?"}]}')
    with pytest.raises(UsageError, match="no file is a data set"):
        put(tmp_path, tmp_path / "q.json", columns=Columns(input="question"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"question": "?", "answers": "x"}\n{"question"\n', "a.jsonl:2"),
        ("a.jsonl", '{"question": "?", "answers": "x"}\n[1]\n', "not an object; at .*a.jsonl:2"),
        ("a.jsonl", '{"question": 1, "a": 2}\n', "no column is called as if"),
        ("a.jsonl", '{"question": [1], "answers": "x"}\n', "in the column question is not text"),
        ("a.jsonl", '{"question": "?", "answers": [[1]]}\n', "in the column answers is not text"),
        ("a.jsonl", '{"id": 1, "question": "?", "answers": "x"}\n' * 2, "an id occurs twice"),
        ("a.csv", "question,answers\nx,y\nx\n", "another number of values"),
        ("a.parquet", "PAR1 no", "cannot be read"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LeverError, match=said):
        put(tmp_path, tmp_path / name)
    assert Store.create(tmp_path / "store").runs() == []


@pytest.mark.slow
def test_what_is_stored_is_official(tmp_path: Path) -> None:
    """A rollout needs neither --questions nor --annotations; text ids come back as they were."""
    rows = [{"id": f"q{n:03d}", "question": f"n{n}?", "answers": [str(n % 3)]} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    store, _ = put(tmp_path, tmp_path / "a.jsonl")
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    request = Request(
        which=Which(store=store.path, dataset="d", split="train"),
        inputs=Inputs(query_embeddings=str(tmp_path / "v.npy")),
        shot_num=1,
    )
    outcome = generate(request)
    assert outcome.report.file == outcome.report.candidates > 0
    found = connect(store).execute(
        "select min(question_id), max(metric) from queries, all_candidates"
    )
    assert found.fetchall() == [("q000", "squad-f1-1")]
