"""Embedding vectors from a file or from the store, as float32 tensors.

In go a path (.pt, .npy, .safetensors) or the name embeddings have in the store; out comes a tensor
[n, d], row = example id. Whatever precision a file has, training is in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.readers.torch_file import read_torch

SUFFIXES = (".pt", ".npy", ".safetensors")


def load_embeddings(
    source: str, con: duckdb.DuckDBPyConnection, prefer: tuple[str, str] | None = None
) -> Tensor:
    """Vectors [n, d] float32, row = example id.

    ``prefer`` is the (dataset, split) to take where the store holds the name for several.

    Raises:
        UsageError: neither a file nor a name in the store.
        LeverError: not one [n, d] tensor of finite floats, or rows are missing in the store.
    """
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UsageError("there is no such embeddings file", value=source)
        values = _from_file(path)
    else:
        values = _from_store(source, con, prefer)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating) or 0 in values.shape:
        raise LeverError(
            "embeddings must be one tensor [n, d] of floats",
            where=source,
            value=f"{values.dtype} {list(values.shape)}",
        )
    vectors = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise LeverError("an embedding holds NaN or infinity", where=f"{source}: row {row}")
    return torch.from_numpy(vectors)


def _from_file(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            return _from_safetensors(path)
    except (OSError, ValueError) as error:
        raise LeverError(f"the embeddings cannot be read ({error})", where=str(path)) from None
    found = read_torch(path)
    if not isinstance(found, np.ndarray):
        raise LeverError(
            "embeddings must be one tensor [n, d]", where=str(path), value=type(found).__name__
        )
    return found


def _from_safetensors(path: Path) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise LeverError(
                    "the file must hold exactly one tensor", where=str(path), value=names
                )
            tensor: Tensor = file.get_tensor(names[0])
    except SafetensorError as error:
        raise LeverError(f"the embeddings cannot be read ({error})", where=str(path)) from None
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


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
            hint=f"a {', '.join(SUFFIXES)} file, or one of: {', '.join(sorted(known)) or 'none'}",
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
