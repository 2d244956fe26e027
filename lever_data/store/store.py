"""The store: a directory of immutable runs, each committed by one atomic rename.

In go Arrow tables (``writer.py``); out come :class:`Run` records read from the manifests. A run is
complete or absent: it is written under ``staging/``, every file and folder is flushed to disk, and
then the folder is renamed into ``runs/``. Readers never lock. A run whose manifest is damaged does
not hide the others: they are read by name, it can be removed by name, and whoever asks for all runs
gets an error that names it.

    store/lever.json                      format version
    store/runs/run=<id>/manifest.json     what the run is and the sha256 of every file
    store/runs/run=<id>/<table>/part-00000.parquet
    store/staging/<uuid>/                 work in progress, invisible to views
    store/removed/<id>-<digits>.json      the note of a removal (``history.py``)
    store/views.sql                       the same relations for any DuckDB shell
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lever_data.errors import LeverError, UsageError
from lever_data.paths import store_path, uri_scheme
from lever_data.store import staging
from lever_data.store.files import fsync_dir
from lever_data.store.history import AS_OF, FOLDER, Removal, inventory_as_of, without_members
from lever_data.store.manifest import (
    Inventory,
    Run,
    RunSpec,
    read_inventory,
    read_manifest,
    to_json,
)
from lever_data.store.mirror import MARKER, Mirror

if TYPE_CHECKING:
    from lever_data.store.writer import RunWriter

__all__ = ["Inventory", "Run", "RunSpec", "Store"]

FORMAT = 2  # 1: no run of schema 2 or later is there, so levers that know no other may read it


class Store:
    """A directory of runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mirror = Mirror.of(path)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open an existing store: a folder, or ``s3://…``, ``gs://…``, ``az://…``.

        Raises:
            LeverError: there is no store at ``path``, or a newer lever wrote it.
        """
        store = cls(store_path(path))
        require_plain_path(store.path)
        if store.mirror is not None:
            store.mirror.refresh()
        marker = store.path / MARKER
        place = str(marker) if store.mirror is None else f"{store.mirror.uri}/{MARKER}"
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
                f"the store's marker lever.json cannot be read ({error})", where=place
            ) from error
        if not isinstance(found, dict) or found.get("format") not in range(1, FORMAT + 1):
            raise LeverError(
                f"this lever reads store formats up to {FORMAT}",
                where=place,
                value=found,
                hint="use the lever version that wrote the store",
            )
        return store

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """Open the store at ``path``, making an empty one where there is none."""
        store = cls(store_path(path))
        require_plain_path(store.path)
        if store.mirror is not None:
            store.mirror.create(to_json({"format": FORMAT}))
        with staging.writable(store.path):
            (store.path / "runs").mkdir(parents=True, exist_ok=True)
            store.staging_folder.mkdir(exist_ok=True)
            marker = store.path / MARKER
            if not marker.exists():
                with staging.locked(store.staging_folder):
                    staging.replace_file(store.staging_folder, marker, to_json({"format": FORMAT}))
        opened = cls.open(path)
        opened._mend()
        return opened

    @classmethod
    @contextmanager
    def to_fill(cls, path: str | Path) -> Iterator[Store]:
        """The store at ``path`` for the runs of the block, made where there is none.

        One that it made in a folder is gone again where the block fails before its first run.
        """
        folder = store_path(path)
        is_filled, had_folder = (folder / MARKER).exists(), folder.exists()
        store = cls.create(path)
        try:
            yield store
            is_filled = True
        finally:
            if not is_filled and store.mirror is None:
                store._unmake(had_folder)

    def _unmake(self, keep_folder: bool) -> None:
        """Take a store away that holds no run and that no other process is writing to."""
        with staging.locked(self.staging_folder):
            if any((self.path / "runs").iterdir()) or staging.is_busy(self.staging_folder):
                return
            (self.path / MARKER).unlink()
        # what else lies there is the user's
        for name in ("runs", "staging", *(() if keep_folder else ("images",))):
            shutil.rmtree(self.path / name, ignore_errors=True)
        if not keep_folder:
            with suppress(OSError):
                self.path.rmdir()

    @property
    def staging_folder(self) -> Path:
        """Where runs are written before they are committed."""
        return self.path / "staging"

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether something is there that :meth:`open` would open, or say what is wrong with."""
        mirror = Mirror.of(path)
        return path.exists() if mirror is None else mirror.exists()

    def inventory(self) -> Inventory:
        """Every run that can be read, the hidden ones, and the damaged ones with why."""
        if self.mirror is not None:
            self.mirror.refresh_runs()
        found = read_inventory(self.path / "runs")
        if moment := os.environ.get(AS_OF):
            found = inventory_as_of(found, self.removals(), moment)
        return without_members(found)

    def removals(self) -> list[Removal]:
        """What was removed, in no order."""
        if self.mirror is not None:
            bucket = self.mirror.bucket
            notes = [bucket.read(o.key) for o in bucket.objects(FOLDER)]
        else:
            notes = [path.read_bytes() for path in (self.path / FOLDER).glob("*.json")]
        return [Removal(**json.loads(note)) for note in notes if note is not None]

    def _require_present(self) -> None:
        """Refuse to change a store that is read as it was."""
        if moment := os.environ.get(AS_OF):
            raise UsageError(
                "nothing is written to a store that is read as of an earlier moment",
                value=moment,
                hint="leave --as-of (LEVER_AS_OF) out; --run names the runs to read",
            )

    def runs(self) -> list[Run]:
        """All committed runs but the hidden ones, oldest first (then by id).

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
        return next(r for r in (*found.runs, *found.hidden) if r.run == name)

    def select(self, run_ids: tuple[str, ...] | list[str] | None) -> list[Run]:
        """The named runs in commit order, each once; all runs for ``None`` or no names."""
        if not run_ids:
            return self.runs()
        chosen = {run.run: run for run in map(self.run, run_ids)}
        return sorted(chosen.values(), key=lambda run: run.place)

    def with_examples(self, run_ids: Sequence[str]) -> tuple[str, ...]:
        """The names and those of all runs of examples: which image a query is about is the same
        whatever runs are compared. No names stay none, which is all runs."""
        examples = (run.run for run in self.runs() if run.kind == "examples")
        return (*run_ids, *examples) if run_ids else ()

    def find(self, spec: RunSpec) -> Run | None:
        """The run this spec would make, where it is already committed."""
        return self.committed(spec.run_id())

    def committed(self, run_id: str) -> Run | None:
        """The run of exactly this id, where there is one."""
        if self.mirror is not None:
            self.mirror.refresh_run(run_id)
        folder = self.path / "runs" / f"run={run_id}"
        return read_manifest(folder) if folder.exists() else None

    def begin(self, spec: RunSpec) -> RunWriter:
        """Start writing a run; use it as a context manager and call ``commit`` inside."""
        self._require_present()
        self.make_ready()
        from lever_data.store.writer import RunWriter  # half of the start of those who only read

        return RunWriter(self, spec)

    def make_ready(self) -> None:
        """Before runs are written: delete what dead writers left, and by the marker keep out older
        levers, which would find nulls where columns have names they do not know."""
        with staging.writable(self.path):
            self.staging_folder.mkdir(exist_ok=True)
            staging.sweep(self.staging_folder)
        if self.mirror is not None:
            self.mirror.sweep()
        self._raise_format()

    def _raise_format(self) -> None:
        marker, wanted = self.path / MARKER, to_json({"format": FORMAT})
        with staging.writable(self.path):
            if json.loads(marker.read_bytes())["format"] >= FORMAT:
                return
            if self.mirror is not None:
                self.mirror.raise_format(wanted)
                return
            with staging.locked(self.staging_folder):
                staging.replace_file(self.staging_folder, marker, wanted)

    def remove(self, run_id: str) -> str:
        """Remove a run, damaged or not, by its id or a prefix only it has; returns the id.

        It is renamed into staging first, so that no reader sees half of it.
        """
        self._require_present()
        found = self.inventory()
        name = found.name_of(run_id)
        times = [run.committed_at for run in (*found.runs, *found.hidden) if run.run == name]
        removal = Removal(name, times[0] if times else None, datetime.now(UTC).isoformat())
        key = f"{FOLDER}/{name}-{uuid.uuid4().hex[:12]}.json"
        folder = self.path / "runs" / f"run={name}"
        grave = staging.grave_in(self.staging_folder)
        if self.mirror is not None:
            self.mirror.bucket.create(key, removal.to_json())
            self.mirror.remove(name)
        with staging.writable(self.path):
            self.staging_folder.mkdir(exist_ok=True)  # copies of a store lose empty folders
            if self.mirror is None:
                (self.path / FOLDER).mkdir(exist_ok=True)
                with staging.locked(self.staging_folder):
                    note = self.path / key
                    staging.replace_file(self.staging_folder, note, removal.to_json())
            _rename_run(folder, grave)
            fsync_dir(folder.parent)
            shutil.rmtree(grave, ignore_errors=True)  # a sweeper may be at it too
            self.write_views_sql()
        return name

    def _mend(self) -> None:
        """Do what a writer that died after its rename left undone: ``views.sql``."""
        script, runs = self.path / "views.sql", self.path / "runs"
        with staging.writable(self.path):
            is_stale = not script.exists() or script.stat().st_mtime < runs.stat().st_mtime
            if is_stale and self.mirror is None and any(runs.iterdir()):
                self.write_views_sql()

    def write_views_sql(self) -> None:
        """Write ``views.sql``: every relation of lever for an ad-hoc DuckDB shell. A mirror has
        none: its files are there only while somebody reads them."""
        if self.mirror is not None:
            return
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
            f"a store is a folder, or s3://, gs://, az:// or hf://, not {scheme}://",
            where=str(path),
            hint="mount it, or download the store",
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
