"""Rows of a data set in a general format: JSON lines, CSV, Parquet, Arrow folders of `datasets`.

In goes a path, out come its data files and their rows as dicts, a row at a time; of CSV every value
is text. Nothing is said here about what a column means. The formats of Hugging Face's `datasets`
are read with pyarrow.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError, reason

Row = dict[str, Any]
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_AT_ONCE = 256  # rows of a batch: pictures may be inside


def is_rows(path: Path) -> bool:
    """Whether a path is a data set by its name, or a folder of one."""
    return path.is_dir() or path.name.removesuffix(".gz").endswith(ENDINGS)


def is_csv(path: Path) -> bool:
    """Whether a file's values are all text."""
    return path.name.removesuffix(".gz").endswith((".csv", ".tsv"))


def data_files(path: Path, split: str | None) -> list[Path]:
    """The files that hold the rows, in order: the file itself, or those of a folder that `datasets`
    saved, or of one with Parquet files named after their split.

    Raises:
        LeverError: the folder holds no rows, or they are chosen by an index file.
        UsageError: it holds several splits and ``split`` names none of them.
    """
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        return data_files(
            path / _split(path, _json(path / "dataset_dict.json")["splits"], split), None
        )
    if (path / "state.json").is_file():
        state = _json(path / "state.json")
        if state.get("_indices_data_files"):
            raise LeverError(
                "the folder holds a selection of rows by an index file",
                where=str(path),
                hint="save it once more after `flatten_indices()`",
            )
        return [path / file["filename"] for file in state["_data_files"]]
    found = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet"), *path.glob("*.arrow")])
    splits = sorted({file.name.partition("-")[0] for file in found if "-of-" in file.name})
    if splits:
        chosen = _split(path, splits, split)
        found = [file for file in found if file.name.startswith(f"{chosen}-")]
    if not found:
        raise LeverError("the folder holds no Parquet or Arrow files", where=str(path))
    return found


def rows_of(path: Path, column: str | None = None) -> Iterator[Row]:
    """The rows of one data file; with ``column`` only that one is read, where the format allows it.
    Memory holds 256 rows, or a page of a Parquet file where that is more.

    Raises:
        LeverError: it is not what its name says; it names the line of a text.
    """
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith((".parquet", ".arrow")):
            for batch in _batches(path, None if column is None else [column]):
                yield from batch.to_pylist()
            return
        with _text(path) as text:
            if is_csv(path):
                yield from _csv(path, text, "\t" if name.endswith(".tsv") else ",")
            else:
                yield from _json_lines(path, text)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise LeverError(f"the file cannot be read ({reason(error)})", where=str(path)) from error


def label_names(path: Path) -> dict[str, list[str]]:
    """Columns of class labels, which are stored as numbers, and their names in order."""
    if not path.name.endswith((".parquet", ".arrow")):
        return {}
    schema = pq.read_schema(path) if path.suffix == ".parquet" else _arrow(path).schema
    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = said.get("info", {}).get("features", {})
    kinds = {name: f for name, f in features.items() if isinstance(f, dict)}
    return {n: f["names"] for n, f in kinds.items() if f.get("_type") == "ClassLabel"}


def _batches(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        # else whole row groups are read ahead: 700 MB of a file of 200 MB that is one
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(_AT_ONCE, columns=columns)
        return
    reader = _arrow(path)
    stored = (
        iter(reader)
        if isinstance(reader, pa.RecordBatchStreamReader)
        else (reader.get_batch(n) for n in range(reader.num_record_batches))
    )
    for batch in stored:
        part = batch if columns is None else batch.select(columns)
        for start in range(0, part.num_rows, _AT_ONCE):
            yield part.slice(start, _AT_ONCE)


def _arrow(path: Path) -> Any:
    """`datasets` writes streams, others files."""
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)


def _text(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), "utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv(path: Path, text: io.TextIOWrapper, separator: str) -> Iterator[Row]:
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise LeverError(
                "a line has another number of values than the first",
                where=f"{path}:{reader.line_num}",
            )
        yield row


def _json_lines(path: Path, text: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise LeverError(f"a line is not JSON ({error})", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise LeverError("a line is not an object", where=f"{path}:{number}", value=line[:40])
        yield row


def _split(path: Path, splits: list[str], wanted: str | None) -> str:
    near = {"val": "validation", "dev": "validation"}
    for name in (wanted, near.get(wanted or "")):
        if name in splits:
            return str(name)
    if len(splits) == 1:
        return splits[0]
    raise UsageError(
        "the folder holds several splits",
        where=str(path),
        value=", ".join(splits),
        hint="--split NAME says which",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LeverError(f"the file cannot be read ({reason(error)})", where=str(path)) from None
    return found
