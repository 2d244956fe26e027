"""The mirror of a store in a bucket: a store's folder whose files are fetched when they are read.

In go the runs and tables that a command is about to read; afterwards their files lie in the mirror,
whole and verified by the manifest's sha256, and DuckDB, pyarrow and polars read them as any other.
Out goes a sealed run: its parts, then its manifest, which only one writer can put. A run without a
manifest is invisible; what a dead writer left is swept when nothing of it is younger than a day.

    s3://bucket/prefix/                 as a store in a folder, without views.sql; and in the cache
    mirror/lock                         held while room is made; one for all mirrors
    mirror/s3/bucket/prefix/.store/     as a store in a folder, and
      lock                              held while it takes over what the bucket lists
      readers/<uuid>                    the runs a live process reads, which are not evicted
      runs/run=<id>/objects.json        what the bucket said of the run; touched when it is read
      runs/run=<id>/<table>/….part      a file on its way, as long as it will be
      images/<sha256>                   pictures, which are not evicted
      jobs/, cache/, staging/           of this machine alone
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError
from lever_data.paths import mirrors, store_uri
from lever_data.store import staging
from lever_data.store.bucket import Bucket, Object
from lever_data.store.files import discard, write_atomic
from lever_data.store.locks import locked
from lever_data.store.manifest import MANIFEST, PART, Run, to_json
from lever_data.store.mirror_room import IMAGES, OBJECTS, hold, make_room

LEASE = timedelta(days=1)  # a writer whose newest part is older is dead
SQL_FOLDERS = ("views", "features", "tests")
MARKER = "lever.json"
_RUN = re.compile(r"runs/(run=[a-z0-9_-]{1,200})/(.+)")
PICTURE = re.compile(r"images/[0-9a-f]{64}")
_SQL = re.compile(r"[a-z]+/[A-Za-z0-9_-]{1,64}\.sql")
_THREADS = 8

Listed = dict[str, dict[str, Object]]  # run=<id> → name in it → object


class Mirror:
    """The mirror in one folder, and the bucket it is of."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri

    @classmethod
    def of(cls, path: Path) -> Mirror | None:
        """The mirror that a store's folder is; ``None`` where it is a store of its own."""
        uri = store_uri(path)
        return None if uri is None else cls(path, uri)

    @cached_property
    def bucket(self) -> Bucket:
        """Connected when it is first asked."""
        if self.uri.startswith("hf:"):
            from lever_data.store.hub import Hub

            return Hub(self.uri)
        return Bucket(self.uri)

    def exists(self) -> bool:
        """Whether a store is there."""
        return self.bucket.read(MARKER) is not None

    def create(self, marker: bytes) -> None:
        """Make an empty store in the bucket unless there is one."""
        if not self.exists():
            self.bucket.require_writable()
            self.bucket.create(MARKER, marker)

    def raise_format(self, marker: bytes) -> None:
        """Put a newer marker in the place of the one that is there; another writer may do the same.

        Raises:
            LeverError: another writer put a different one meanwhile.
        """
        there = self.bucket.look(MARKER)
        state = None if there is None else self.bucket.swap(MARKER, marker, there.state)
        if state is None and self.bucket.read(MARKER) != marker:
            raise LeverError("the store's marker changed meanwhile", where=f"{self.uri}/{MARKER}")
        with self._changing():
            _put(self.path / MARKER, marker)

    def refresh(self) -> None:
        """Take over the marker and the user's SQL.

        Raises:
            LeverError: there is no store in the bucket, or it cannot be read.
        """
        marker = self.bucket.read(MARKER)
        if marker is None:
            raise LeverError(
                "there is no store here",
                where=self.uri,
                hint="make one with `lever ingest FILE --store …` or `lever copy`, or mend the "
                "address",
            )
        present = self.bucket.folders()
        with self._changing():
            _put(self.path / MARKER, marker)
            for folder in SQL_FOLDERS:
                self._refresh_sql(folder, is_present=folder in present)

    def refresh_runs(self) -> None:
        """Take over which runs there are."""
        listed = _by_run(self.bucket.objects("runs"))
        with self._changing():
            here = {path.name for path in self.path.glob("runs/run=*")}
            for name in sorted(here | {n for n, found in listed.items() if MANIFEST in found}):
                self._take(name, listed.get(name, {}))

    def refresh_run(self, run: str) -> None:
        """Take over one run, without a listing of all."""
        place = f"run={run}"
        listed = _by_run(self.bucket.objects(f"runs/{place}"))
        with self._changing():
            self._take(place, listed.get(place, {}))

    def _take(self, name: str, listed: dict[str, Object]) -> None:
        """Take over a run as it is listed; one that is not is asked for, as listings may lag."""
        folder = self.path / "runs" / name
        found = listed.get(MANIFEST)
        said = {
            "manifest": found and found.etag,
            "sizes": {n: o.size for n, o in listed.items() if PART.fullmatch(n)},
        }
        if found is not None and _read_json(folder / OBJECTS) == said:
            return
        manifest = self.bucket.read(f"runs/{name}/{MANIFEST}")
        if manifest is None:
            self._bury(folder)
            return
        old = folder / MANIFEST
        if old.exists() and _files_of(old.read_bytes()) != _files_of(manifest):
            self._bury(folder)  # it was removed and made again, with other bytes
        folder.mkdir(parents=True, exist_ok=True)
        _put(old, manifest)
        write_atomic(folder / OBJECTS, to_json(said))

    def _bury(self, folder: Path) -> None:
        if folder.exists():
            grave = staging.grave_in(self.path / "staging")
            folder.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _refresh_sql(self, folder: str, *, is_present: bool) -> None:
        """The user's own SQL files of one folder, as the bucket has them now."""
        objects = self.bucket.objects(folder) if is_present else []
        listed = {o.key for o in objects if _SQL.fullmatch(o.key)}
        for path in (self.path / folder).glob("*.sql"):
            if f"{folder}/{path.name}" not in listed:
                path.unlink()
        for key in sorted(listed):
            if (text := self.bucket.read(key)) is not None:
                (self.path / folder).mkdir(exist_ok=True)
                _put(self.path / key, text)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the mirror's lock, and make what the disk refuses a readable error."""
        with staging.writable(self.path):
            for folder in ("runs", "staging", "readers"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            with locked(self.path / "lock"):
                yield

    def fetch(self, runs: Sequence[Run], tables: Collection[str] | None = None) -> None:
        """Have the files of runs here, and keep them while this process lives.

        Args:
            tables: only the files of these tables; all where ``None``.

        Raises:
            LeverError: a file is missing in the bucket or is not what was committed, or all of
                them together do not fit into the cache.
        """
        files = [
            (run, name)
            for run in runs
            for name in sorted(run.files)
            if tables is None or name.split("/", 1)[0] in tables
        ]
        with staging.writable(self.path), locked(mirrors() / "lock"):
            hold(self.path, {run.path.name for run in runs})
            missing = [file for file in files if not (file[0].path / file[1]).exists()]
            self._reserve(missing)
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._fetch, missing):
                pass
        for run in runs:
            with suppress(FileNotFoundError):  # removed meanwhile, which whoever opens it will say
                os.utime(run.path / OBJECTS)

    def release(self) -> None:
        """Let the files that were fetched be evicted: nothing reads them any more."""
        with locked(mirrors() / "lock"):
            hold(self.path, set(), alone=True)

    def _reserve(self, files: Sequence[tuple[Run, str]]) -> None:
        """Make room and take it, by files as long as they will be."""
        new = [(r, n) for r, n in files if not _partial(r.path / n).exists()]
        sizes = [self._size(run, name) for run, name in new]
        if sizes:
            make_room(sum(sizes))
        for (run, name), size in zip(new, sizes, strict=True):
            path = _partial(run.path / name)
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.truncate(size)

    def _size(self, run: Run, name: str) -> int:
        known: int | None = _read_json(run.path / OBJECTS).get("sizes", {}).get(name)
        try:
            return self.bucket.size(self._key(run, name)) if known is None else known
        except FileNotFoundError:
            raise self._fault(run, name, "is missing in the bucket") from None

    def _fetch(self, file: tuple[Run, str]) -> None:
        run, name = file
        path = run.path / name
        part = _partial(path)
        with staging.writable(self.path), locked(path.with_name(f"{path.name}.lock")):
            if path.exists():
                return  # another process was at it
            try:
                digest = self._fill(part, self._key(run, name), self._size(run, name))
            except FileNotFoundError:
                discard(part)
                raise self._fault(run, name, "is missing in the bucket") from None
            if digest != run.files[name]:
                discard(part)
                raise self._fault(run, name, "is not what was committed, in the bucket")
            part.replace(path)

    def _fill(self, part: Path, key: str, size: int) -> str:
        """Fill a reserved file from the bucket; the sha256 of what came."""
        digest = sha256()
        part.touch()  # whoever reserved it may have failed
        with part.open("r+b") as out:
            for piece in self.bucket.chunks(key, size):
                out.write(piece)
                digest.update(piece)
        return digest.hexdigest()

    def fetch_pictures(self) -> bool:
        """Have all pictures of the store here; whether there are any.

        Raises:
            LeverError: they do not fit into the cache, or one is not what was put.
        """
        found = [one for one in self.bucket.objects(IMAGES) if PICTURE.fullmatch(one.key)]
        missing = [one for one in found if not (self.path / one.key).exists()]
        with staging.writable(self.path), locked(mirrors() / "lock"):
            make_room(sum(one.size for one in missing))
            (self.path / IMAGES).mkdir(exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._fetch_picture, missing):
                pass
        return bool(found)

    def _fetch_picture(self, picture: Object) -> None:
        data = self.bucket.read(picture.key)
        if data is None or picture.key != f"{IMAGES}/{sha256(data).hexdigest()}":
            raise LeverError(
                "a picture is not what was put, in the bucket",
                where=f"{self.uri}/{picture.key}",
                hint="delete this object and ingest its data set again",
            )
        with staging.writable(self.path):
            write_atomic(self.path / picture.key, data)

    def damage(self, run: Run, name: str) -> str | None:
        """What is wrong with a file's bytes in the bucket, all of which are read; ``None``: no
        fault."""
        key = self._key(run, name)
        try:
            is_intact = self.bucket.digest(key) == run.files[name]
        except FileNotFoundError:
            return "the file is missing in the bucket"
        return None if is_intact else "its bytes in the bucket are not those that were committed"

    def forget(self, run: Run, name: str) -> None:
        """Delete the copy of a file that is here: it is fetched anew."""
        discard(run.path / name)

    def _key(self, run: Run, name: str) -> str:
        return f"runs/{run.path.name}/{name}"

    def _fault(self, run: Run, name: str, fault: str) -> LeverError:
        return LeverError(
            f"a file of run {run.run} {fault}",
            where=f"{self.uri}/{self._key(run, name)}",
            hint="was the run removed meanwhile? Start again; else `lever copy` it here once more "
            f"from where it is whole, or `lever runs rm {run.run}` and make it again",
        )

    def publish(self, folder: Path, run: str) -> None:
        """Put a sealed run into the bucket; one that is there with the same files is completed.

        Args:
            folder: holds its manifest and parts.

        Raises:
            LeverError: a run of this id with other bytes is there.
        """
        key = f"runs/run={run}/{MANIFEST}"
        manifest = (folder / MANIFEST).read_bytes()
        files: dict[str, str] = json.loads(manifest)["files"]
        there = self.bucket.read(key)
        if there is None:
            self._upload(folder, run, files)
            there = manifest if self.bucket.create(key, manifest) else self.bucket.read(key)
        if there is not None and _files_of(there) != files:
            raise LeverError(
                "another run of this id is in the store, with other bytes",
                where=f"{self.uri}/runs/run={run}",
                hint=f"another version of lever or pyarrow wrote it: `lever runs rm {run}` "
                "removes it",
            )
        # A sweeper, or who removed the run before, may have met parts that had no manifest yet.
        self._upload(folder, run, files)

    def _upload(self, folder: Path, run: str, files: dict[str, str]) -> None:
        for name, digest in sorted(files.items()):
            key = f"runs/run={run}/{name}"
            if self.bucket.sha256(key) != digest:
                self.bucket.upload(key, folder / name, digest)

    def remove(self, run: str) -> None:
        """Delete a run: its manifest, so that nobody sees the rest, then its parts. What does not
        belong to a run stays."""
        self.bucket.require_writable()
        place = f"runs/run={run}"
        self.bucket.delete([f"{place}/{MANIFEST}"])
        parts = _by_run(self.bucket.objects(place)).get(f"run={run}", {})
        self.bucket.delete([o.key for name, o in parts.items() if PART.fullmatch(name)])

    def sweep(self) -> None:
        """Delete the parts that dead writers left.

        Their age is told by the bucket's clock alone: this machine's may be wrong.

        Raises:
            LeverError: nothing can be written there.
        """
        self.bucket.require_writable()
        now = None
        for found in _by_run(self.bucket.objects("runs")).values():
            parts = [o for name, o in found.items() if PART.fullmatch(name)]
            if not parts or MANIFEST in found:
                continue
            now = self.bucket.now() if now is None else now
            if max(o.modified for o in parts) < now - LEASE:
                self.bucket.delete([o.key for o in parts])


def _by_run(objects: Sequence[Object]) -> Listed:
    """What was listed below runs/, by run; anything else that lies there is not ours."""
    found = [(match, one) for one in objects if (match := _RUN.fullmatch(one.key))]
    return {
        name: {match[2]: one for match, one in inner}
        for name, inner in groupby(found, key=lambda pair: pair[0][1])
    }


def _files_of(manifest: bytes) -> Any:
    """The files that a manifest names; ``None`` where it is none."""
    try:
        return json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _put(path: Path, data: bytes) -> None:
    """Write a small file unless it is there as it should be: an unchanged one keeps its times."""
    if not path.exists() or path.read_bytes() != data:
        write_atomic(path, data)
