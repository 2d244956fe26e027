"""The staging folder of a store: work in progress, and what dead writers left of it.

Everything that appears in or leaves staging/ does so under one lock, so that a writer can tell
what is alive: a live writer holds a lock file of its own beside its folder, and a file of the
store's root is replaced only while the one lock is held.

    staging/lock                 the one lock
    staging/<uuid>/  <uuid>.lock a run being written, and its writer's lock
    staging/removed-<uuid>/      a run being deleted
    staging/new-<name>           a file of the store's root being replaced
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lever_data.errors import LeverError
from lever_data.store import locks
from lever_data.store.files import write_by_way_of
from lever_data.store.locks import is_held

_GRAVE = "removed-"
_NEW = "new-"


@contextmanager
def locked(staging: Path) -> Iterator[None]:
    """Hold the one lock under which things appear in staging/ and are swept from it."""
    with locks.locked(staging / "lock"):
        yield


def lock_of(folder: Path) -> Path:
    """The lock file of a staging folder, beside it: the folder itself moves at commit."""
    return folder.with_name(f"{folder.name}.lock")


def grave_in(staging: Path) -> Path:
    """A fresh name under which a run is deleted."""
    return staging / f"{_GRAVE}{uuid.uuid4().hex}"


def is_busy(staging: Path) -> bool:
    """Whether there is work of a live writer; the caller holds the lock."""
    return any(is_held(entry) for entry in staging.glob("?*.lock"))


def sweep(staging: Path) -> None:
    """Delete what dead writers left; a live writer holds a lock on its own."""
    graves = []
    with locked(staging):
        for entry in staging.iterdir():
            if entry.name.startswith(_GRAVE):
                graves.append(entry)
            elif entry.name.startswith(_NEW):
                entry.unlink()  # its writer held the lock that is ours now
            elif entry.is_dir() and not is_held(lock_of(entry)):
                grave = grave_in(staging)
                entry.rename(grave)
                graves.append(grave)
            elif _is_orphan(entry):
                entry.unlink()
    for grave in graves:
        shutil.rmtree(grave, ignore_errors=True)  # another sweeper may be at it too


def replace_file(staging: Path, target: Path, data: bytes) -> None:
    """Write a file of the store's root whole or not at all; the caller holds the lock.

    The temporary file lies in staging/, where the next writer sweeps it if this one dies.
    """
    write_by_way_of(staging / f"{_NEW}{target.name}", target, data)


def _is_orphan(entry: Path) -> bool:
    """Whether this is the lock file of a dead writer whose folder is gone."""
    return entry.suffix == ".lock" and not entry.with_suffix("").exists() and not is_held(entry)


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Make what the disk refuses an error that names the store."""
    try:
        yield
    except OSError as error:
        raise LeverError(
            f"the store cannot be written ({error.strerror or error})",
            where=str(root),
            hint="is the disk full, or the folder read-only?",
        ) from error
