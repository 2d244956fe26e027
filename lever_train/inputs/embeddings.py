"""Embedding vectors from a file or from the store, as float32 tensors.

In go a path (.pt, .npy, .safetensors) or the name embeddings have in the store; out comes a tensor
[n, d], row = example id. Whatever precision a file has, training is in float32.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lever_data.errors import LeverError, UsageError
from lever_data.readers.vectors import read_vectors

KINDS = {
    ".pt": "torch",
    ".pth": "torch",
    ".npy": "npy",
    ".safetensors": "safetensors",
}  # suffix → kind of file
_ROWS = 65_536


def load_embeddings(
    source: str, con: duckdb.DuckDBPyConnection, prefer: tuple[str, str] | None = None
) -> Tensor:
    """Vectors [n, d] float32, row = example id.

    ``prefer`` is the (dataset, split) to take where the store holds the name for several. Several
    sources, joined by commas, stand side by side: unit vectors of each, so scaled that a cosine of
    the whole is the mean of the cosines.

    Raises:
        UsageError: neither a file nor a name in the store; or those side by side differ in rows.
        LeverError: not one [n, d] tensor of finite floats, a row of zeros, all rows equal, or rows
            are missing in the store.
    """
    path = Path(source)
    if "," in source and not path.is_file():
        parts = [load_embeddings(part.strip(), con, prefer) for part in source.split(",")]
        if len({len(part) for part in parts}) > 1:
            rows = ", ".join(f"{len(part):,}" for part in parts)
            raise UsageError("vectors side by side differ in rows", where=source, value=rows)
        joined = torch.cat([normalize(part, dim=-1) for part in parts], dim=-1)
        return joined / math.sqrt(len(parts))
    if path.suffix in KINDS:
        if not path.is_file():
            raise UsageError("there is no such embeddings file", value=source)
        values = read_vectors(path, KINDS[path.suffix])
    else:
        values = _from_store(source, con, prefer)
    vectors = _copied(values)
    for start in range(0, len(vectors), _ROWS):
        finite = np.isfinite(vectors[start : start + _ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise LeverError("an embedding holds NaN or infinity", where=f"{source}: row {row}")
    if path.suffix in KINDS:  # a run of `lever embed` names the items it was told to go on without
        _require_telling(vectors, source)
    return torch.from_numpy(vectors)


def _copied(values: np.ndarray) -> np.ndarray:
    """Float32 [n, d] of our own: files are mapped, read only. What was copied of a file is let go,
    or it counted twice as memory of this process."""
    file: object = values
    while isinstance(file, np.ndarray):
        file = file.base
    copy = np.empty(values.shape, np.float32)
    for start in range(0, len(values), _ROWS):
        copy[start : start + _ROWS] = values[start : start + _ROWS]
        if isinstance(file, mmap.mmap):
            file.madvise(mmap.MADV_DONTNEED)
    return copy


def _require_telling(vectors: np.ndarray, source: str) -> None:
    """Refuse rows that say nothing of their item: an encoder that failed leaves such."""
    empty = np.flatnonzero(~vectors.any(axis=1))
    if len(empty):
        raise LeverError(
            "an embedding is all zeros, which is similar to nothing",
            where=f"{source}: row {empty[0]}",
            value=f"{len(empty):,} of {len(vectors):,} rows",
            hint="embed these items anew: an encoder that failed leaves zeros",
        )
    # the last row first: where it differs, as it nearly always does, nothing else is compared
    if len(vectors) > 1 and (vectors[-1] == vectors[0]).all() and (vectors == vectors[0]).all():
        raise LeverError(
            "all embeddings are equal, so nothing tells one item from another",
            where=source,
            value=f"{len(vectors):,} rows",
            hint="embed the items anew",
        )


def _from_store(
    name: str, con: duckdb.DuckDBPyConnection, prefer: tuple[str, str] | None
) -> np.ndarray:
    reader = con.cursor()
    keys = reader.execute(
        "select dataset, split, count(*), max(example_id) from embeddings where name = ? "
        "group by all order by all",
        [name],
    ).fetchall()
    if not keys:
        known = [r[0] for r in reader.execute("select distinct name from embeddings").fetchall()]
        raise UsageError(
            "these embeddings are neither a file nor in the selected runs",
            value=name,
            hint=f"a {', '.join(KINDS)} file, or one of: {', '.join(sorted(known)) or 'none'}",
        )
    if len(keys) > 1:
        keys = [key for key in keys if (key[0], key[1]) == prefer] or keys
    if len(keys) > 1:
        raise UsageError(
            "several datasets or splits hold embeddings of this name",
            value=", ".join(f"{d}/{s}" for d, s, _, _ in keys),
            hint="give the file, or remove one of the runs",
        )
    dataset, split, count, last = keys[0]
    if count != last + 1:
        raise LeverError(
            "rows of the embeddings are missing", where=name, value=f"{count} of {last + 1}"
        )
    sql = (
        "select vector from embeddings where name = $name and dataset = $dataset "
        "and split = $split order by example_id"
    )
    chosen = {"name": name, "dataset": dataset, "split": split}
    table = cast(pa.Table, reader.sql(sql, params=chosen).to_arrow_table())
    lists = table.column(0).combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    if len(flat) % count:
        raise LeverError("embeddings of one name have several widths", where=name)
    return np.array(flat, dtype=np.float32).reshape(count, -1)
