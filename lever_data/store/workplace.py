"""The workplace of a job: what the processes share that make one run together.

In go entries, each a folder that appears whole or not at all, and claims, so that of several
processes one makes an entry; out come the entries' folders, on whatever machine. A claim is a file
lock where the processes share a folder, which the kernel drops with its process. In a bucket it is
a lease: an object that one process can put and only its owner can renew, and that counts until the
bucket's own clock says it was not renewed for :data:`LEASE`. An owner that was taken for dead and
is only slow does no harm: of an entry that is put twice the first counts.

    jobs/<key>/<entry>/            in a folder, and <entry>.lock beside it
    jobs/<key>/<entry>.zip         in a bucket
    jobs/<key>/<entry>.lease       while it is being made; empty where its owner gave up
    jobs/<key>/answers/<file>      what was paid for and is in no entry yet
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Self
from zipfile import BadZipFile, ZipFile

from lever_data.errors import LeverError
from lever_data.store.bucket import Bucket, State
from lever_data.store.files import fsync_dir, fsync_tree, write_atomic
from lever_data.store.store import Store

LEASE = timedelta(seconds=60)  # three renewals: one may be lost, and the bucket be slow for another
_REMOVED = ".removed-"
_THREADS = 8


class Workplace:
    """The workplace of one job in a folder that all its processes see.

    Args:
        folder: ``<store>/jobs/<key>``.
        answers: the folder of files that processes show each other, each with the sha256 of its
            bytes in its name; in a store's folder all look into the same one.
    """

    def __init__(self, folder: Path, answers: Path) -> None:
        self.folder, self.answers = folder, answers

    @classmethod
    def of(cls, store: Store, key: str, answers: Path) -> Workplace:
        """The workplace of a job in a store."""
        folder = store.path / "jobs" / key
        if store.mirror is None:
            return Workplace(folder, answers)
        return BucketWorkplace(folder, answers, store.mirror.bucket)

    @property
    def where(self) -> str:
        """The place as its user names it."""
        return str(self.folder)

    def entries(self) -> set[str]:
        """The names of what is finished."""
        return {p.name for p in self.folder.glob("[a-z]*") if p.is_dir()}

    def has(self, name: str) -> bool:
        """Whether an entry is finished."""
        return (self.folder / name).is_dir()

    def open(self, names: Sequence[str]) -> list[Path]:
        """The folders of finished entries.

        Raises:
            FileNotFoundError: one was removed.
        """
        return [self.folder / name for name in names]

    def add(self, name: str, made: Path) -> None:
        """Make an entry of a folder, which is moved.

        Raises:
            OSError: the disk refuses it.
        """
        fsync_tree(made)
        made.rename(self.folder / name)
        fsync_dir(self.folder)

    def forget(self, name: str) -> None:
        """Remove an entry."""
        self._bury(self.folder / name)

    def remove(self) -> None:
        """Remove the whole: its rows are in a committed run."""
        self._bury(self.folder)

    def _bury(self, folder: Path) -> None:
        """Delete a folder. It is renamed first, so that a crash leaves nothing that only looks
        finished; what a crash left of an earlier removal goes too."""
        with suppress(FileNotFoundError):  # never made, or another process was first
            folder.rename(self.folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}"))
        for left in self.folder.parent.glob(f"{_REMOVED}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the claim of an entry, or of any other name; False where another process has it.
        Who waits gets it, or False once the entry is finished."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / f"{name}.lock").open("w")
        except OSError as error:
            raise LeverError(
                f"the store cannot be written ({error.strerror})", where=str(self.folder)
            ) from error
        with handle as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def share(self, file: Path) -> None:
        """Show a file of the answers to the other processes."""

    def gather(self) -> None:
        """Have the files of the answers that the others showed."""


class BucketWorkplace(Workplace):
    """The workplace of a job in a bucket; ``folder`` and ``answers`` hold this machine's copies."""

    def __init__(self, folder: Path, answers: Path, bucket: Bucket) -> None:
        super().__init__(folder, answers)
        self._bucket = bucket
        self._place = f"jobs/{folder.name}"
        self._copies: dict[str, str] = {}  # entry → its copy, named after what the bucket holds
        self._gathered: set[str] = set()

    @property
    def where(self) -> str:
        """The place as its user names it."""
        return f"{self._bucket.uri}/{self._place}"

    def entries(self) -> set[str]:
        """The names of what is finished."""
        self._copies = {
            found[1]: f"{found[1]}-{sha256(repr(one.state).encode()).hexdigest()[:16]}"
            for one in self._bucket.objects(self._place)
            if (found := re.fullmatch(f"{self._place}/([a-z0-9-]+)[.]zip", one.key))
        }
        return set(self._copies)

    def has(self, name: str) -> bool:
        """Whether an entry is finished."""
        return self._bucket.look(self._key(name, "zip")) is not None

    def open(self, names: Sequence[str]) -> list[Path]:
        """The folders of finished entries, fetched where they are not here."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._fetch, names))

    def _fetch(self, name: str) -> Path:
        if name not in self._copies:
            raise FileNotFoundError(name)
        copy = self.folder / self._copies[name]
        if copy.is_dir():
            return copy
        data = self._bucket.read(self._key(name, "zip"))
        if data is None:
            raise FileNotFoundError(name)
        temporary = self.folder / f".{uuid.uuid4().hex}"
        try:
            with ZipFile(io.BytesIO(data)) as archive:
                archive.extractall(temporary)
            temporary.rename(copy)
        except BadZipFile as error:
            raise LeverError(
                f"a finished part of the job cannot be read ({error})",
                where=f"{self.where}/{name}.zip",
                hint="delete this object and run the command again: it will be made anew",
            ) from None
        except OSError:
            if not copy.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return copy

    def add(self, name: str, made: Path) -> None:
        """Make an entry of a folder, unless one is there: then that counts."""
        buffer = io.BytesIO()
        with ZipFile(buffer, "w") as archive:
            for path in sorted(made.iterdir()):
                archive.write(path, path.name)
        self._bucket.create(self._key(name, "zip"), buffer.getvalue())

    def forget(self, name: str) -> None:
        """Remove an entry."""
        self._bucket.delete([self._key(name, "zip")])
        self._copies.pop(name, None)

    def remove(self) -> None:
        """Remove the whole: its rows are in a committed run."""
        self._bucket.delete([found.key for found in self._bucket.objects(self._place)])
        super().remove()

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lease of an entry, or of any other name."""
        self._bucket.require_writable()
        lease = Lease(self._bucket, self._key(name, "lease"))
        pauses = chain((0.5, 1.0, 2.0, 4.0), repeat(8.0))
        while not lease.take():
            if not wait or self.has(name):
                yield False
                return
            time.sleep(next(pauses))
        with lease:
            if lease.is_inherited:  # its last owner may have paid for answers
                self.gather()
            yield True

    def share(self, file: Path) -> None:
        """Show a file of the answers to the other processes."""
        self._bucket.create(f"{self._place}/answers/{file.name}", file.read_bytes())
        self._gathered.add(file.name)

    def gather(self) -> None:
        """Have the files of the answers that the others showed."""
        folder = f"{self._place}/answers"
        names = {found.key.removeprefix(f"{folder}/") for found in self._bucket.objects(folder)}
        missing = [n for n in sorted(names - self._gathered) if not (self.answers / n).exists()]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._take_over, missing):
                pass
        self._gathered |= names

    def _take_over(self, name: str) -> None:
        data = self._bucket.read(f"{self._place}/answers/{name}")
        if data is None:
            return  # the job is over
        if Path(name).name != name or sha256(data).hexdigest() not in name:
            raise LeverError(
                "this object is not what was put under its name",
                where=f"{self.where}/answers/{name}",
                hint="delete it; what it held will be asked again",
            )
        self.answers.mkdir(parents=True, exist_ok=True)
        write_atomic(self.answers / name, data)

    def _key(self, name: str, kind: str) -> str:
        return f"{self._place}/{name}.{kind}"


class Lease:
    """An object that says who is at work; held by ``with`` once it is taken."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._state: State | None = None  # of what we put last; None: it is not ours
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self.is_inherited = False  # whether its last owner left without an end

    def take(self) -> bool:
        """Take it, where nobody who lives has it."""
        self._state = self._bucket.swap(self._key, self._words(0), None)
        if self._state is None and (found := self._bucket.look(self._key)) is not None:
            if found.size and found.modified > self._bucket.now() - LEASE:
                return False
            self._state = self._bucket.swap(self._key, self._words(0), found.state)
            self.is_inherited = True
        return self._state is not None

    def _words(self, number: int) -> bytes:
        """What nobody else puts, and we never twice: a version is told by the bytes in S3."""
        return f"{self._owner} {number}".encode()

    def _renew(self) -> None:
        for number in range(1, 1 << 62):
            if self._over.wait(LEASE.total_seconds() / 3) or self._state is None:
                return
            with suppress(LeverError):  # it may be there again when we are next due
                self._state = self._bucket.swap(self._key, self._words(number), self._state)

    def __enter__(self) -> Self:
        self._renewing.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let it go. After an error it stays, empty: whoever takes it inherits."""
        self._over.set()
        self._renewing.join()
        with suppress(LeverError):  # it ends by itself
            ours = self._state is not None and self._bucket.swap(self._key, b"", self._state)
            if ours and error is None:
                self._bucket.delete([self._key])
