"""Forms of a query's result: csv, json, parquet, and the first rows as a table's cells.

In go Arrow record batches, out come bytes. This runs in the query's own process, so that its limits
bound what a wide value costs: a list of 20 million numbers is gigabytes of Python objects.
"""

from __future__ import annotations

import csv
import io
import math
from typing import IO, Any

import msgspec
import pyarrow as pa

from lever_data.errors import LeverError, UsageError

FORMS = ("table", "csv", "json", "parquet")
SHOWN = 200  # rows a table shows; the other forms give all
_CELL = 2000  # characters of a cell that a table shows
_ITEMS = 100  # items of a list that a table shows
_ENCODER = msgspec.json.Encoder(decimal_format="number", enc_hook=str)


def write(reader: pa.RecordBatchReader, form: str, out: IO[bytes]) -> int:
    """Write a result as csv, json (one array of objects), parquet, or a table's first rows as JSON
    (``names``, ``rows``, ``more``: rows not shown); returns the rows there are.

    Raises:
        UsageError: the form is unknown, or two columns have one name where names are keys.
        LeverError: a value has no such form.
    """
    names = reader.schema.names
    if form in ("json", "parquet") and len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(
            "columns of the result share a name",
            value=", ".join(twice),
            hint="name them apart: select a.x as first, b.x as second",
        )
    if form == "csv":
        return _write_csv(reader, out)
    if form == "json":
        return _write_json(reader, out)
    if form == "parquet":
        return _write_parquet(reader, out)
    if form == "table":
        return _write_table(reader, out)
    raise UsageError("unknown format", value=form, hint=f"one of {', '.join(FORMS)}")


def _write_csv(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:

    text = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    names = reader.schema.names
    writer.writerow(names)
    rows = 0
    for batch in reader:
        columns = [_plain(*pair) for pair in zip(names, batch.columns, strict=True)]
        writer.writerows(zip(*columns, strict=True))
        rows += batch.num_rows
    text.detach()
    return rows


def values(name: str, column: pa.Array) -> list[Any]:
    """The values of a column as Python's.

    Raises:
        LeverError: one has no such form, such as a date before the year 1.
    """
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError, pa.ArrowNotImplementedError) as error:
        raise LeverError(
            f"a value of the result cannot be written ({error})",
            where=f"column {name}",
            hint=f"select it as text: {name}::varchar",
        ) from None


def _plain(name: str, column: pa.Array) -> list[Any]:
    """Values for a CSV cell: nested ones as JSON, null as the empty cell."""
    found = values(name, column)
    if not pa.types.is_nested(column.type):
        return found
    return [v if v is None else msgspec.json.encode(v).decode() for v in found]


def _write_table(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    names = reader.schema.names
    shown: list[list[Any]] = []
    rows = 0
    for batch in reader:
        part = batch.slice(0, max(SHOWN - len(shown), 0))
        columns = [
            [_cell(v) for v in values(name, _shortened(column))]
            for name, column in zip(names, part.columns, strict=True)
        ]
        shown += [list(row) for row in zip(*columns, strict=True)]
        rows += batch.num_rows
    out.write(_ENCODER.encode({"names": names, "rows": shown, "more": rows - len(shown)}))
    return rows


def _shortened(column: pa.Array) -> pa.Array:
    """Lists cut to what is shown of them, and one item more."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return column
    import pyarrow.compute as pc  # 50 ms, which a result without lists does not pay

    return pc.list_slice(column, 0, _ITEMS + 1)


def _cell(value: Any) -> Any:
    """A number, a truth or null as it is; anything else as text, cut where it is long."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list) and len(value) > _ITEMS:
        value = str(value[:_ITEMS])[:-1] + ", …]"
    text = str(value)
    return text if len(text) <= _CELL else f"{text[:_CELL]}… ({len(text):,} characters)"


def _write_json(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    rows = 0
    out.write(b"[")
    names = reader.schema.names
    for batch in reader:
        columns = [values(*pair) for pair in zip(names, batch.columns, strict=True)]
        for row in zip(*columns, strict=True):
            out.write(b",\n " if rows else b"")
            out.write(_ENCODER.encode(dict(zip(names, row, strict=True))))  # NaN becomes null
            rows += 1
    out.write(b"]\n")
    return rows


def _write_parquet(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import pyarrow.parquet as pq

    rows = 0
    try:
        with pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
                rows += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        raise LeverError(
            f"Parquet has no such type ({error})", hint="select the column as text: name::varchar"
        ) from None
    return rows
