"""The store: a directory of immutable runs, each committed by one atomic rename.

In go Arrow tables through a :class:`RunWriter`; out come :class:`Run` records read from the
manifests. A run is complete or absent: it is written under ``staging/``, every file and folder is
flushed to disk, and then the folder is renamed into ``runs/``. Readers never lock.

    store/lever.json                      format version
    store/runs/run=<id>/manifest.json     what the run is and the sha256 of every file
    store/runs/run=<id>/<table>/part-00000.parquet
    store/staging/<uuid>/                 work in progress, invisible to views
    store/views.sql                       the same relations for any DuckDB shell
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.files import fsync_dir, fsync_tree, sha256_file, write_atomic
from lever_data.manifest import MANIFEST, Run, RunSpec, read_manifest
from lever_data.schema import SCHEMA_VERSION
from lever_data.tables import TableWriter

__all__ = ["Run", "RunSpec", "RunWriter", "Store", "sha256_file", "write_atomic"]

FORMAT = 1


class Store:
    """A directory of runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open an existing store.

        Raises:
            LeverError: there is no store at ``path``, or a newer lever wrote it.
        """
        store = cls(Path(path))
        marker = store.path / "lever.json"
        try:
            found = json.loads(marker.read_bytes())
        except FileNotFoundError:
            raise LeverError(
                "there is no store here",
                where=str(store.path),
                hint="make one with `lever ingest FILE --store DIR`, or name it with --store "
                "or the variable LEVER_STORE",
            ) from None
        except (OSError, ValueError) as error:
            raise LeverError(
                f"the store's marker lever.json cannot be read ({error})", where=str(marker)
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise LeverError(
                f"this lever reads store format {FORMAT}",
                where=str(marker),
                value=found,
                hint="use the lever version that wrote the store",
            )
        return store

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """Open the store at ``path``, making an empty one where there is none."""
        root = Path(path)
        with _writable(root):
            (root / "runs").mkdir(parents=True, exist_ok=True)
            (root / "staging").mkdir(exist_ok=True)
            if not (root / "lever.json").exists():
                write_atomic(root / "lever.json", _to_json({"format": FORMAT}))
        return cls.open(root)

    def runs(self) -> list[Run]:
        """All committed runs, oldest first (then by id).

        Raises:
            LeverError: a manifest cannot be read; it names the run.
        """
        folders = sorted((self.path / "runs").glob("run=*"))
        found = [run for f in folders if (run := read_manifest(f)) is not None]
        return sorted(found, key=lambda run: (run.committed_at, run.run))

    def run(self, run_id: str) -> Run:
        """One run by its id, or by a prefix that only one run has."""
        runs = self.runs()
        matches = [r for r in runs if r.run == run_id] or [
            r for r in runs if run_id and r.run.startswith(run_id)
        ]
        if len(matches) == 1:
            return matches[0]
        names = ", ".join(r.run for r in (matches or runs)) or "none"
        problem = "several runs begin like this" if matches else "there is no such run"
        raise LeverError(problem, value=run_id, hint=f"runs of {self.path}: {names}")

    def select(self, run_ids: tuple[str, ...] | list[str] | None) -> list[Run]:
        """The named runs in commit order, each once; all runs for ``None`` or no names."""
        if not run_ids:
            return self.runs()
        wanted = {self.run(run_id).run for run_id in run_ids}
        return [run for run in self.runs() if run.run in wanted]

    def find(self, spec: RunSpec) -> Run | None:
        """The run this spec would make, where it is already committed."""
        folder = self.path / "runs" / f"run={spec.run_id()}"
        return read_manifest(folder) if folder.exists() else None

    def begin(self, spec: RunSpec) -> RunWriter:
        """Start writing a run; use it as a context manager and call ``commit`` inside."""
        with _writable(self.path):
            self.sweep_staging()
        return RunWriter(self, spec)

    def remove(self, run_id: str) -> Run:
        """Remove a run: renamed into staging first, so no reader sees half of it."""
        run = self.run(run_id)
        grave = self.path / "staging" / f"removed-{uuid.uuid4().hex}"
        with _writable(self.path):
            run.path.rename(grave)
            fsync_dir(run.path.parent)
            shutil.rmtree(grave, ignore_errors=True)  # a sweeper may be at it too
            self.write_views_sql()
        return run

    def sweep_staging(self) -> None:
        """Delete what dead writers left under staging/; a live writer holds a lock on its own."""
        graves = []
        with self.staging_locked():
            for entry in (self.path / "staging").iterdir():
                if entry.name.startswith("removed-"):
                    graves.append(entry)
                elif entry.is_dir() and not _held(_lock_of(entry)):
                    grave = entry.with_name(f"removed-{uuid.uuid4().hex}")
                    entry.rename(grave)
                    graves.append(grave)
                elif (
                    entry.suffix == ".lock"
                    and not entry.with_suffix("").exists()
                    and not _held(entry)
                ):
                    entry.unlink()
        for grave in graves:
            shutil.rmtree(grave, ignore_errors=True)  # another sweeper may be at it too

    @contextmanager
    def staging_locked(self) -> Iterator[None]:
        """Hold the one lock under which writers appear in staging/ and dead ones are swept."""
        with (self.path / "staging" / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def write_views_sql(self) -> None:
        """Write ``views.sql``: every relation of lever for an ad-hoc DuckDB shell."""
        from lever_data.catalog import shell_script

        write_atomic(self.path / "views.sql", shell_script(self.path).encode())


class RunWriter:
    """A run being written. Leaving the ``with`` block without ``commit`` discards it."""

    def __init__(self, store: Store, spec: RunSpec) -> None:
        self.store = store
        self.spec = spec
        self.folder = store.path / "staging" / uuid.uuid4().hex
        self._tables: dict[str, TableWriter] = {}
        self._lock = -1

    def __enter__(self) -> Self:
        with _writable(self.store.path), self.store.staging_locked():
            self._lock = os.open(_lock_of(self.folder), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.folder.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for table in self._tables.values():
            table.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)
        _lock_of(self.folder).unlink(missing_ok=True)
        os.close(self._lock)
        if isinstance(error, OSError) and not isinstance(error, LeverError):
            raise LeverError(
                f"writing the run failed ({error.strerror or error}); nothing was committed",
                where=str(self.store.path),
            ) from error

    def write(self, table: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows to a table. Rows that come out of order are sorted at commit."""
        if table not in self._tables:
            self._tables[table] = TableWriter(self.folder / table, table, rows.schema)
        self._tables[table].write(rows)

    def commit(self, details: Mapping[str, Any] | None = None) -> Run:
        """Flush, hash and publish the run; returns it.

        A second writer of the same run that comes too late gets the run already there: both
        wrote the same rows.
        """
        for table in self._tables.values():
            table.close()
        manifest = self._manifest(dict(details or {}))
        write_atomic(self.folder / MANIFEST, _to_json(manifest))
        fsync_tree(self.folder)
        target = self.store.path / "runs" / f"run={self.spec.run_id()}"
        try:
            self.folder.rename(target)
        except OSError:
            if not target.exists():
                raise
        fsync_dir(target.parent)
        self.store.write_views_sql()
        return self.store.run(self.spec.run_id())

    def _manifest(self, details: dict[str, Any]) -> dict[str, Any]:
        files = {
            str(p.relative_to(self.folder)): sha256_file(p)
            for p in sorted(self.folder.rglob("*.parquet"))
        }
        ranges = [t.key_range for t in self._tables.values() if t.key_range is not None]
        low_high = [min(r[0] for r in ranges), max(r[1] for r in ranges)] if ranges else None
        spec = self.spec
        return {
            "run": spec.run_id(),
            "kind": spec.kind,
            "dataset": spec.dataset,
            "split": spec.split,
            "committed_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "rows": {name: t.num_rows for name, t in sorted(self._tables.items())},
            "files": files,
            "query_range": low_high,
            "source": {**spec.source, "sha256": spec.source_sha256},
            "parameters": spec.parameters,
            "parents": list(spec.parents),
            "details": details,
            "schema_version": SCHEMA_VERSION,
            "lever_version": version("lever"),
        }


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LeverError(
            f"the store cannot be written ({error.strerror or error})",
            where=str(root),
            hint="is the disk full, or the folder read-only?",
        ) from error


def _lock_of(folder: Path) -> Path:
    """The lock file of a staging folder, beside it: the folder itself moves at commit."""
    return folder.with_name(f"{folder.name}.lock")


def _held(lock: Path) -> bool:
    """Whether a live writer holds this lock file."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
