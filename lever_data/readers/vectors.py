"""Embedding vectors from a file, as one array, without ever unpickling objects.

In goes a ``.npy``, ``.safetensors`` or torch file; out comes a float array [n, d], mapped from the
file where that is possible, so that memory does not grow with it. Format of safetensors:
github.com/huggingface/safetensors (eight bytes of length, a JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa

from lever_data.errors import LeverError, reason
from lever_data.readers.torch_file import read_torch
from lever_data.store import schema

_ROWS = 8192
_BY_ITSELF = "save the tensor [n, d] by itself: a row is an item by its place in the split"
_SAFE_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_vectors(path: Path, kind: str) -> np.ndarray:
    """The one [n, d] float array of a file; float16 and bfloat16 keep their values in float32.

    Args:
        path: the file.
        kind: ``npy``, ``safetensors`` or ``torch``, as :func:`.detect.detect` says.

    Raises:
        LeverError: no such array, several, of integers, or empty.
    """
    try:
        if kind == "npy" or is_npy(path):  # features saved by numpy under a name of torch's
            values: object = map_npy(path)
        elif kind == "safetensors":
            values = _read_safetensors(path)
        else:
            values = _only_tensor(read_torch(path, copy=False), path)
    except (OSError, ValueError, EOFError) as error:
        raise LeverError(
            f"the embeddings cannot be read ({reason(error)})", where=str(path)
        ) from None
    return _check(values, path)


def is_npy(path: Path) -> bool:
    """Whether a file is numpy's, whatever its name."""
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def map_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped.

    Raises:
        ValueError: it is not one. numpy parses the header as Python: whatever that gives is one.
        OSError: it cannot be read.
    """
    if not is_npy(path):  # numpy would take it for a pickle, and say how to load it unsafely
        raise ValueError("this is not a .npy file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # written by Python 2: read all the same
            found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        SyntaxError,
        TokenError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"its header is damaged: {error}") from None
    return found


def embedding_batches(
    values: np.ndarray, dataset: str, split: str, name: str, source: str
) -> Iterator[pa.RecordBatch]:
    """Rows of the embeddings table, row i of the array as example i.

    Raises:
        LeverError: a vector holds NaN or infinity; it names the row.
    """
    width = values.shape[1]
    table = schema.embeddings(width)
    for start in range(0, len(values), _ROWS):
        part = np.ascontiguousarray(values[start : start + _ROWS], dtype=np.float32)
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise LeverError(
                "a vector holds NaN, infinity or a number beyond float32",
                where=f"{source}, row {row}",
            )
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
        yield pa.RecordBatch.from_arrays(
            [
                pa.repeat(dataset, len(part)),
                pa.repeat(split, len(part)),
                pa.repeat(name, len(part)),
                pa.array(np.arange(start, start + len(part), dtype=np.int64)),
                vectors.cast(table.field("vector").type),
            ],
            schema=table,
        )


def _only_tensor(value: object, path: Path) -> object:
    """A bare tensor, or the only array of a dict."""
    if isinstance(value, dict):
        arrays = {key: v for key, v in value.items() if isinstance(v, np.ndarray)}
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        raise LeverError(
            "the file must hold exactly one tensor",
            where=str(path),
            value=[str(key) for key in value][:20],
            hint=_BY_ITSELF,
        )
    return value


def _read_safetensors(path: Path) -> np.ndarray:
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(size - 8, 100 << 20):
            raise ValueError("the header is longer than the file")
        header = json.loads(handle.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    if len(header) != 1:
        raise LeverError(
            "the file must hold exactly one tensor",
            where=str(path),
            value=list(header)[:20],
            hint=_BY_ITSELF,
        )
    return _map_safetensor(path, next(iter(header.values())), 8 + length, size)


def _map_safetensor(path: Path, entry: Any, start: int, size: int) -> np.ndarray:
    try:
        code, shape, (low, high) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError("the header does not describe a tensor") from None
    numbers = [*shape, low, high] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError("the header gives an impossible shape")
    if code not in _SAFE_TYPES:
        raise LeverError(
            "embeddings must be floats of at least 16 bits", where=str(path), value=code
        )
    dtype = np.dtype(_SAFE_TYPES[code])
    if high - low != math.prod(shape) * dtype.itemsize or start + high > size:
        raise ValueError("the header does not fit the data")
    if 0 in shape:
        return np.zeros(shape, np.float32)
    values = np.memmap(path, dtype=dtype, mode="r", offset=start + low, shape=tuple(shape))
    if code == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _check(values: object, path: Path) -> np.ndarray:
    if not isinstance(values, np.ndarray):
        raise LeverError(
            "embeddings must be one tensor [n, d]", where=str(path), value=type(values).__name__
        )
    found = f"{values.dtype} {list(values.shape)}"
    if np.issubdtype(values.dtype, np.integer) and values.ndim == 2:
        raise LeverError(
            "a table of integers is not an embeddings file",
            where=str(path),
            value=found,
            hint="a table of candidate ids goes to `lever train --pool`",
        )
    if values.ndim != 2 or 0 in values.shape or not np.issubdtype(values.dtype, np.floating):
        raise LeverError("embeddings must be floats [n, d]", where=str(path), value=found)
    return values
