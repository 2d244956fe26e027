"""Check a store: manifests against files, files against the schema, rows against the data tests,
pictures against their names.

In goes a store, out come problems, none where all is well. A data test is a SQL file whose rows
are failures: lever's own stand in ``sql/tests``, a user's in ``<store>/tests``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.catalog import Relation, body, parse
from lever_data.errors import LeverError, reason
from lever_data.relations.db import open_session, require_select
from lever_data.store.files import sha256_file
from lever_data.store.mirror import PICTURE, Mirror
from lever_data.store.schema import OFFICIAL_IDS, TABLES, embeddings, todays
from lever_data.store.store import Run, Store
from lever_data.store.verified import FULL

_SHOWN = 5  # failing rows kept as examples

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """Something wrong: what was checked, where, and what was found.

    ``kind`` is ``manifest``, ``file``, ``schema`` or ``test``; ``examples`` are failing rows.
    """

    kind: str
    where: str
    what: str
    examples: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Report:
    """What was checked, and the problems."""

    num_runs: int
    num_files: int
    num_tests: int
    problems: tuple[Problem, ...]


def check(
    store: Store, *, runs: Sequence[str] = (), progress: Progress = lambda what: None
) -> Report:
    """Check checksums, schemas, row counts, pictures and data tests of the named runs, or of all.

    Damage is reported, not raised; tests run only where every file is whole.
    """
    chosen = store.select(list(runs))
    chosen += [] if runs else store.inventory().hidden
    problems: list[Problem] = []
    num_files = 0
    for run in chosen:
        progress(run.run)
        num_files += len(run.files)
        mirror = store.mirror
        problems += _check_files(run) if mirror is None else _check_mirrored(mirror, run)
    pictures = {name for run in chosen for name in _pictures(run)}
    num_files += len(pictures)
    problems += _check_pictures(store, sorted(pictures))
    tests, unreadable = _tests(store)
    if not problems:
        problems += _run_tests(store, runs, tests, progress)
    problems += unreadable
    return Report(len(chosen), num_files, len(tests), tuple(problems))


def _check_files(run: Run) -> list[Problem]:
    found = []
    on_disk = {str(p.relative_to(run.path)) for p in run.path.rglob("*.parquet")}
    for name in sorted(on_disk - set(run.files)):
        found.append(Problem("file", f"{run.run}/{name}", "the manifest does not know this file"))
    rows: dict[str, int] = {}
    for name, digest in sorted(run.files.items()):
        path, where = run.path / name, f"{run.run}/{name}"
        table = name.split("/", 1)[0]
        try:
            if sha256_file(path) != digest:
                found.append(Problem("file", where, "its bytes are not those that were committed"))
                continue
            rows[table] = rows.get(table, 0) + pq.read_metadata(path).num_rows
            found += _check_schema(run, path, table)
        except FileNotFoundError:
            found.append(Problem("file", where, "the file is missing"))
        except (OSError, pa.ArrowException) as error:
            found.append(Problem("file", where, f"the file cannot be read ({reason(error)})"))
    for table, count in run.rows.items():
        if not found and rows.get(table, 0) != count:
            what = f"{table} has {rows.get(table, 0)} rows, the manifest says {count}"
            found.append(Problem("manifest", run.run, what))
    return found


def _pictures(run: Run) -> Iterator[str]:
    """The pictures of a run's items that were put into the store; a damaged file has none."""
    for name in run.files if "examples" in run.rows else ():
        if name.startswith("examples/"):
            with suppress(OSError, pa.ArrowException), pq.ParquetFile(run.path / name) as file:
                for batch in file.iter_batches(columns=["image_path"]):
                    paths = batch.column(0).drop_null().to_pylist()
                    yield from (path for path in paths if PICTURE.fullmatch(path))


def _check_pictures(store: Store, names: Iterable[str]) -> Iterator[Problem]:
    """Each is named by its content."""
    for name in names:
        try:
            if _picture_digest(store, name) != name.rpartition("/")[2]:
                yield Problem("file", name, "the picture is not the one that was ingested")
        except FileNotFoundError:
            yield Problem("file", name, "the picture is missing")
        except OSError as error:
            yield Problem("file", name, f"the picture cannot be read ({reason(error)})")


def _picture_digest(store: Store, name: str) -> str:
    """sha256 of a picture; of one in a bucket as it is here, where it is and is whole."""
    path = store.path / name
    if store.mirror is None:
        return sha256_file(path)
    if path.exists() and sha256_file(path) == path.name and os.environ.get(FULL) != "full":
        return path.name
    path.unlink(missing_ok=True)  # a copy in the cache says nothing of the store
    return store.mirror.bucket.digest(name)


def _check_mirrored(mirror: Mirror, run: Run) -> list[Problem]:
    """Fetch what is not here, which verifies it; with ``--verify full`` all that the bucket holds
    is read."""
    if os.environ.get(FULL) == "full":
        damage = {name: mirror.damage(run, name) for name in sorted(run.files)}
        if found := [Problem("file", f"{run.run}/{n}", w) for n, w in damage.items() if w]:
            return found
    for name, digest in run.files.items():
        path = run.path / name
        if path.exists() and sha256_file(path) != digest:
            mirror.forget(run, name)  # a copy in the cache says nothing of the store
    try:
        mirror.fetch([run])
    except LeverError as error:
        return [Problem("file", error.where or run.run, error.what)]
    return _check_files(run)


def _check_schema(run: Run, path: Path, table: str) -> list[Problem]:
    """Every column known and of its type; older files may lack columns, never required ones."""
    where, present = f"{run.run}/{path.relative_to(run.path)}", pq.read_schema(path)
    if run.has_older_names:
        present = todays(present)
    if table == "embeddings":
        kind = present.field("vector").type if "vector" in present.names else pa.null()
        wanted = embeddings(kind.list_size if pa.types.is_fixed_size_list(kind) else 1)
    elif table in TABLES:
        wanted = TABLES[table]
    else:
        return []
    found = []
    for name in present.names:
        if name not in wanted.names:
            found.append(Problem("schema", where, f"lever has no column {name}"))
        elif name in OFFICIAL_IDS and pa.types.is_string(present.field(name).type):
            continue
        elif present.field(name).type != wanted.field(name).type:
            types = f"{present.field(name).type}, not {wanted.field(name).type}"
            found.append(Problem("schema", where, f"the column {name} is {types}"))
    for field in wanted:
        if field.name not in present.names and not field.nullable:
            found.append(Problem("schema", where, f"the column {field.name} is missing"))
    return found


def _tests(store: Store) -> tuple[list[Relation], list[Problem]]:
    """The data tests, lever's and the user's, and those of the user's that cannot be read."""
    root = resources.files("lever_sql") / "tests"
    own = sorted((e for e in root.iterdir() if e.name.endswith(".sql")), key=lambda e: e.name)
    tests = [parse(e.name.removesuffix(".sql"), "tests", e.read_text("utf-8")) for e in own]
    unreadable = []
    for path in sorted((store.path / "tests").glob("*.sql")):
        try:
            tests.append(parse(path.stem, "user tests", path.read_text("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            unreadable.append(
                Problem("test", path.stem, f"the test cannot be read ({reason(error)})")
            )
    return tests, unreadable


def _run_tests(
    store: Store, runs: Sequence[str], tests: Iterable[Relation], progress: Progress
) -> list[Problem]:
    found = []
    with open_session(store, runs=runs).con as con:
        for test in tests:
            progress(test.name)
            try:
                con.execute(require_select(con, body(test)))
                names = [column[0] for column in con.description or ()]
                rows = con.fetchall()
            except (duckdb.Error, LeverError) as error:
                what = f"the test does not run: {str(error).splitlines()[0]}"
                found.append(Problem("test", test.name, what))
                continue
            if rows:
                examples = [dict(zip(names, row, strict=True)) for row in rows[:_SHOWN]]
                purpose = f": {test.purpose}" if test.purpose else ""
                what = f"{len(rows)} {'row fails' if len(rows) == 1 else 'rows fail'}{purpose}"
                found.append(Problem("test", test.name, what, tuple(examples)))
    return found


def require_sound(report: Report) -> None:
    """Raise where there are problems.

    Raises:
        LeverError: says how many.
    """
    if report.problems:
        is_damage = any(problem.kind != "test" for problem in report.problems)
        raise LeverError(
            f"the store has {counted(len(report.problems), 'problem')}",
            hint="restore damaged files from a copy, or remove the run (`lever runs rm`) and "
            "ingest its source again"
            if is_damage
            else "look at the rows with `lever query`; what came from a bad source is removed with "
            "`lever runs rm`, and a test that is wrong is mended in <store>/tests/",
        )


def counted(number: int, what: str) -> str:
    """``1 problem``, ``2 problems``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def describe(problem: Problem) -> str:
    """The problem on one line."""
    shown = "; ".join(json.dumps(row, default=str) for row in problem.examples)
    return f"{problem.kind} {problem.where}: {problem.what}" + (f" such as {shown}" * bool(shown))
