"""The store: a directory of immutable runs, each committed by one atomic rename.

In go Arrow tables through a :class:`RunWriter`; out come :class:`Run` records read from the
manifests. A run is complete or absent: it is written under ``staging/``, every file and folder is
flushed to disk, and then the folder is renamed into ``runs/``. Readers never lock. A run whose
manifest is damaged does not hide the others: they are read by name, it can be removed by name, and
whoever asks for all runs gets an error that names it.

    store/lever.json                      format version
    store/runs/run=<id>/manifest.json     what the run is and the sha256 of every file
    store/runs/run=<id>/<table>/part-00000.parquet
    store/staging/<uuid>/                 work in progress, invisible to views
    store/views.sql                       the same relations for any DuckDB shell
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lever_data import __version__
from lever_data.errors import LeverError
from lever_data.paths import uri_scheme
from lever_data.store import staging
from lever_data.store.files import fsync_dir, fsync_tree, sha256_file, write_atomic
from lever_data.store.locks import Lock
from lever_data.store.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Inventory,
    Run,
    RunSpec,
    read_inventory,
    read_manifest,
    sealed,
    to_json,
)

if TYPE_CHECKING:  # half of the start of commands that only read manifests
    import pyarrow as pa

    from lever_data.store.tables import TableWriter

__all__ = ["Inventory", "Run", "RunSpec", "RunWriter", "Store", "sha256_file", "write_atomic"]

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
        except (OSError, ValueError, RecursionError) as error:
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
        store = cls(Path(path))
        require_plain_path(store.path)
        with _writable(store.path):
            (store.path / "runs").mkdir(parents=True, exist_ok=True)
            store.staging_folder.mkdir(exist_ok=True)
            marker = store.path / "lever.json"
            if not marker.exists():
                with staging.locked(store.staging_folder):
                    staging.replace_file(store.staging_folder, marker, to_json({"format": FORMAT}))
        opened = cls.open(path)
        opened._mend()
        return opened

    @property
    def staging_folder(self) -> Path:
        """Where runs are written before they are committed."""
        return self.path / "staging"

    def inventory(self) -> Inventory:
        """Every run that can be read, and the damaged ones with why."""
        return read_inventory(self.path / "runs")

    def runs(self) -> list[Run]:
        """All committed runs, oldest first (then by id).

        Raises:
            LeverError: a run is damaged; it names the run. Leaving it out would change every
                figure without a word; to go on without it, name the others.
        """
        found = self.inventory()
        for error in found.damaged.values():
            raise error
        return found.runs

    def run(self, run_id: str) -> Run:
        """One run by its id, or by a prefix that only one run has.

        Raises:
            LeverError: there is none, there are several, or the one is damaged.
        """
        found = self.inventory()
        name = found.name_of(run_id)
        if name in found.damaged:
            raise found.damaged[name]
        return next(r for r in found.runs if r.run == name)

    def select(self, run_ids: tuple[str, ...] | list[str] | None) -> list[Run]:
        """The named runs in commit order, each once; all runs for ``None`` or no names."""
        if not run_ids:
            return self.runs()
        chosen = {run.run: run for run in map(self.run, run_ids)}
        return sorted(chosen.values(), key=lambda run: (run.committed_at, run.run))

    def find(self, spec: RunSpec) -> Run | None:
        """The run this spec would make, where it is already committed."""
        folder = self.path / "runs" / f"run={spec.run_id()}"
        return read_manifest(folder) if folder.exists() else None

    def begin(self, spec: RunSpec) -> RunWriter:
        """Start writing a run; use it as a context manager and call ``commit`` inside."""
        with _writable(self.path):
            self.staging_folder.mkdir(exist_ok=True)
            staging.sweep(self.staging_folder)
        return RunWriter(self, spec)

    def remove(self, run_id: str) -> str:
        """Remove a run, damaged or not, by its id or a prefix only it has; returns the id.

        It is renamed into staging first, so that no reader sees half of it.
        """
        name = self.inventory().name_of(run_id)
        folder = self.path / "runs" / f"run={name}"
        grave = staging.grave_in(self.staging_folder)
        with _writable(self.path):
            self.staging_folder.mkdir(exist_ok=True)  # copies of a store lose empty folders
            _rename_run(folder, grave)
            fsync_dir(folder.parent)
            shutil.rmtree(grave, ignore_errors=True)  # a sweeper may be at it too
            self.write_views_sql()
        return name

    def _mend(self) -> None:
        """Do what a writer that died after its rename left undone: ``views.sql``."""
        script, runs = self.path / "views.sql", self.path / "runs"
        with _writable(self.path):
            is_stale = not script.exists() or script.stat().st_mtime < runs.stat().st_mtime
            if is_stale and any(runs.iterdir()):
                self.write_views_sql()

    def write_views_sql(self) -> None:
        """Write ``views.sql``: every relation of lever for an ad-hoc DuckDB shell."""
        from lever_data.catalog import shell_script

        with staging.locked(self.staging_folder):  # the last of two writers has seen both runs
            script = shell_script(self.path).encode()
            staging.replace_file(self.staging_folder, self.path / "views.sql", script)


def require_plain_path(path: Path) -> None:
    """Refuse a URI, and a path that DuckDB reads as a pattern (``*?[]``) or as partitions (``=``).

    Raises:
        LeverError: it names the characters.
    """
    if (scheme := uri_scheme(path)) is not None:
        raise LeverError(
            f"a store is a local folder, no {scheme}:// address",
            where=str(path),
            hint="mount it, or copy the store here",
        )
    if found := sorted(set("*?[]=") & set(str(path.resolve()))):
        raise LeverError(
            f"the path of a store may not hold {' '.join(found)}",
            where=str(path),
            hint="name the folder otherwise, or move the store",
        )


def _rename_run(folder: Path, grave: Path) -> None:
    try:
        folder.rename(grave)
    except FileNotFoundError:
        raise LeverError("the run is gone: somebody else removed it", where=str(folder)) from None


class RunWriter:
    """A run being written. Leaving the ``with`` block without ``commit`` discards it."""

    def __init__(self, store: Store, spec: RunSpec) -> None:
        self.store = store
        self.spec = spec
        self.folder = store.staging_folder / uuid.uuid4().hex
        self._tables: dict[str, TableWriter] = {}
        self._lock = Lock(staging.lock_of(self.folder))

    def __enter__(self) -> Self:
        with _writable(self.store.path), staging.locked(self.store.staging_folder):
            self._lock.take()
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
        try:
            # under the one lock, or a sweeper could meet the folder alive and its lock gone
            with _writable(self.store.path), staging.locked(self.store.staging_folder):
                staging.lock_of(self.folder).unlink()
        finally:
            self._lock.release()
        if isinstance(error, OSError) and not isinstance(error, LeverError):
            raise LeverError(
                f"writing the run failed ({error.strerror or error}); nothing was committed",
                where=str(self.store.path),
            ) from error

    def write(self, table: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows to a table. Rows that come out of order are sorted at commit."""
        from lever_data.store.tables import TableWriter

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
        write_atomic(self.folder / MANIFEST, to_json(sealed(manifest)))
        fsync_tree(self.folder)
        target = self.store.path / "runs" / f"run={self.spec.run_id()}"
        try:
            self.folder.rename(target)
        except OSError:
            if not target.exists():
                raise
        fsync_dir(target.parent)
        self.store.write_views_sql()
        found = self.store.find(self.spec)
        if found is None:
            raise LeverError("the run was removed while it was committed", value=target.name)
        return found

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
            "lever_version": __version__,
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
