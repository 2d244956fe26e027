"""Rows of a view → the records of a snapshot, and the groups they form.

In go batches of Arrow with the columns that ``stream.py`` asks of a view; out come records of one
width, and where each group begins. Nothing here may call ``to_numpy``, which imports
pandas where it is installed: 50 MB and 0.3 s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.errors import LeverError

Ids = NDArray[np.int64]
Records = NDArray[np.void]

GROUP_KEY = ("view_index", "dataset", "split", "query_id", "shot_num")
WITHIN = ("run", "candidate")  # the order of a group's candidates

# Small, as they stay in memory: 43 MB for 20 million candidates in groups of 15.
GROUP = np.dtype(
    [
        *(("query_id", "<i8"), ("start", "<i8"), ("size", "<i4"), ("nulls", "<u4")),
        *((name, "<i2") for name in ("view_index", "dataset", "split", "shot_num")),
    ]
)
# ``count`` candidates of a query that the filters left out, for the reason of this number.
DROPPED = np.dtype(
    [
        *(("query_id", "<i8"), ("count", "<i4")),
        *((name, "<i2") for name in ("dataset", "split", "reason")),
    ]
)
REASONS = ("eval_failed", "gen_method", "fallback")


def record(columns: tuple[str, ...], width: int) -> np.dtype[np.void]:
    """The record of a candidate: ``reward``, ``behaviour`` (its log-probability in nats) and the
    selection's own columns as float64, NaN where null; its ``candidate`` number; and its
    ``pointer`` int32[width], of which the first ``length`` count."""
    width += width % 2  # whole words, or numpy reads the doubles byte by byte
    return np.dtype(
        [
            *((name, "<f8") for name in ("reward", "behaviour", *columns)),
            *(("candidate", "<i4"), ("length", "<i4"), ("pointer", "<i4", (width,))),
        ]
    )


def whole_groups(
    reader: pa.RecordBatchReader, take: Callable[[pa.RecordBatch], object]
) -> Records | None:
    """Hand every batch on; returns the groups [G] by key, of dtype ``GROUP``, ``None`` where rows
    do not stand together.

    Raises:
        LeverError: a key is null.
    """
    parts = bytearray()  # grows in place, where joined arrays were in memory twice
    last: dict[str, Any] = {}
    before = nulls = 0
    for batch in reader:
        if not batch.num_rows:
            continue
        keys = {name: numbers(batch.column(name), name) for name in (*GROUP_KEY, *WITHIN)}
        begins = _begins(keys, last)
        if begins is None:
            return None
        starts = np.flatnonzero(begins)
        found = np.empty(len(starts), GROUP)
        for name in GROUP_KEY:
            found[name] = keys[name][starts]
        found["start"] = starts + before
        lacking = nulls + np.cumsum(np.from_dlpack(batch.column("lacks")))
        # how many came before: the difference counts, also where 32 bits run over
        found["nulls"] = np.concatenate([[nulls], lacking])[starts]
        parts += found.tobytes()
        last = {name: values[-1] for name, values in keys.items()}
        before += batch.num_rows
        nulls = int(lacking[-1])
        take(batch)
    groups = np.frombuffer(parts, GROUP)
    groups["size"] = np.diff(groups["start"], append=before)
    groups["nulls"] = np.diff(groups["nulls"], append=np.uint32(nulls % (1 << 32)))
    if not _ascend(groups):
        groups = groups[np.lexsort([groups[name] for name in reversed(GROUP_KEY)])]
    return groups if _ascend(groups) else None


def _ascend(groups: Records) -> bool:
    """Whether each key is above the one before it."""
    above = np.zeros(max(0, len(groups) - 1), dtype=bool)
    for name in reversed(GROUP_KEY):
        first, second = groups[name][:-1], groups[name][1:]
        above = (second > first) | ((second == first) & above)
    return bool(above.all())


def _begins(keys: dict[str, NDArray[Any]], last: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Which rows begin a group; ``None`` where rows of one are not in the order of (run,
    candidate)."""
    change = np.zeros(len(keys["run"]), dtype=bool)
    change[0] = not last
    before = {n: np.insert(v[:-1], 0, last.get(n, v[0])) for n, v in keys.items()}
    for name in GROUP_KEY:
        change |= keys[name] != before[name]
    run, candidate = keys["run"], keys["candidate"]
    later = (run > before["run"]) | ((run == before["run"]) & (candidate >= before["candidate"]))
    return change if (change | later).all() else None


def distinct(ids: Ids) -> Ids:
    """Without those that equal their neighbour: of ascending ``ids`` [n] each once.

    ``np.unique`` takes five times the memory.
    """
    kept = np.append(True, ids[1:] != ids[:-1])[: len(ids)]
    return ids if kept.all() else ids[kept]


def save_array(path: Path, array: NDArray[Any]) -> None:
    """``np.save`` that fails where the disk is full: numpy writes into a file by a handle of its
    own, and what that still holds when it is closed is lost without an error.

    Args:
        path: with its suffix; none is added.

    Raises:
        OSError: the file cannot be written whole.
    """
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(as_bytes(array))


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of an array that is in one piece."""
    return array.view(np.uint8).data


def integers(values: NDArray[Any]) -> pa.Array:
    """Integers as an Arrow array; ``pa.array`` would import pandas where it is installed: 0.5 s."""
    kind, buffer = pa.from_numpy_dtype(values.dtype), pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def _whole(column: pa.Array, name: str) -> pa.Array:
    if column.null_count:
        raise LeverError(f"rows of the view lack a {name}", hint="leave them out in its SQL")
    return column


def numbers(column: pa.Array, name: str) -> Ids:
    """Integers, or the places of texts in their dictionary; LeverError where one is null."""
    column = _whole(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.indices
    numbers: Ids = np.from_dlpack(column).astype(np.int64)
    return numbers


def records(batch: pa.RecordBatch, columns: tuple[str, ...], width: int) -> Records:
    """The rows of a batch as records [n], of the dtype of :func:`record`.

    Raises:
        LeverError: a pointer, or an id in one, is null.
    """
    found = np.zeros(batch.num_rows, record(columns, width))
    for name in ("reward", "behaviour", *columns):
        found[name] = np.from_dlpack(batch.column(name))
    found["candidate"] = np.from_dlpack(batch.column("candidate"))
    pointers = _whole(batch.column("pointer"), "pointer")
    bounds = np.from_dlpack(pointers.offsets)
    lengths = np.diff(bounds)
    found["length"] = lengths
    steps = np.arange(found.dtype["pointer"].shape[0]) < lengths[:, None]
    # `flatten` would load Arrow's kernels: 8 MB and 0.1 s
    found["pointer"][steps] = numbers(pointers.values, "pointer")[bounds[0] : bounds[-1]]
    return found
