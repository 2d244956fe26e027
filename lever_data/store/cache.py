"""What can be made again: entries in the user's cache folder, each made once, whole or not at all.

An entry is a folder of files under a key that says everything it was made of. One process makes it
while the others wait; a damaged one is made again, and the least lately used go where all of them
take more than ``LEVER_CACHE_SIZE``. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError
from lever_data.paths import cache_folder, cache_size
from lever_data.store.files import sha256_file
from lever_data.store.locks import Lock
from lever_data.store.spill import new_spill_folder
from lever_data.store.verified import HashMemory

_SEAL = "seal.json"  # the sha256 of every other file of an entry
# A sweep looks at every entry, at hundreds for longer than most take to make: those below this part
# of the limit, remembered values mostly, are followed by one where their key says so, one of 256.
_SMALL = 4_096


@contextmanager
def entry(key: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """The folder of an entry, made by ``make(folder)`` where there is none.

    It is ours until the block ends. Files that were mapped by then stay readable for as long as
    they are, also when another process deletes the entry.

    Args:
        key: a digest of all that the entry is made of.

    Raises:
        LeverError: it cannot be written.
    """
    limit = cache_size()
    root, lock = _own_lock(key)
    try:
        folder = root / key
        if not _is_intact(folder):
            with _writable(root):
                _replace(folder, make)
            if _size(folder) * _SMALL >= limit or key.startswith("00"):
                _sweep(root, keep=folder, limit=limit)
        with suppress(OSError):  # when it was used last
            os.utime(folder)
        yield folder
    finally:
        lock.release()


def value(made_of: Sequence[object], make: Callable[[], Any]) -> Any:
    """What ``make()`` gave when it was last asked for the same, as JSON has it; else it is asked.

    Args:
        made_of: all that the value depends on, told apart by ``repr``.
    """
    name = "value.json"

    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(make()))

    with entry(hashlib.sha256(repr([*made_of]).encode()).hexdigest(), write) as folder:
        return json.loads((folder / name).read_bytes())


def _own_lock(key: str) -> tuple[Path, Lock]:
    """The folder of all entries, and the lock of this one, taken.

    Where the user's cache cannot be written or locked it is a folder of this process alone.
    """
    shared = cache_folder() / "snapshots"
    with suppress(OSError):
        shared.mkdir(parents=True, exist_ok=True)
        return shared, _taken(shared, key)
    private = new_spill_folder()
    private.mkdir(parents=True)
    return private, _taken(private, key)


def _lock(root: Path, key: str) -> Lock:
    return Lock(root / f"lock-{key[:2]}")  # 256 files at most, and none is ever removed


def _taken(root: Path, key: str) -> Lock:
    lock = _lock(root, key)
    lock.take()
    return lock


def _is_intact(folder: Path) -> bool:
    """Whether the entry is there and its files are what was written."""
    try:
        digests = json.loads((folder / _SEAL).read_bytes())
        memory = HashMemory(folder.parent)
        found = all(memory.is_intact(folder / name, digest) for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False
    memory.remember()
    return found


def _replace(folder: Path, make: Callable[[Path], None]) -> None:
    """Make an entry under a name of its own; it gets its name when it is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process: the lock is ours now
    temporary.mkdir()
    try:
        make(temporary)
        digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        (temporary / _SEAL).write_text(json.dumps(digests))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(root: Path, keep: Path, limit: int) -> None:
    """Delete what killed processes left half-made, and the entries used longest ago beyond the
    limit; those that a process opens at this moment stay."""
    entries = [path for path in root.iterdir() if path.is_dir() and path != keep]
    half_made = [path for path in entries if path.name.startswith(".")]
    whole = sorted(set(entries) - set(half_made), key=_last_use)
    total = sum(map(_size, [*whole, keep]))
    for path in [*half_made, *whole]:
        is_whole = path not in half_made
        if is_whole and total <= limit:
            return
        lock = _lock(root, path.name.removeprefix("."))
        if lock.take(wait=False):
            total -= _size(path) if is_whole else 0
            shutil.rmtree(path, ignore_errors=True)
            lock.release()


def _last_use(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    with suppress(FileNotFoundError):  # another process sweeps, too
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LeverError(
            f"the cache cannot be written ({error.strerror or error})",
            where=str(root),
            hint="make room there, or name another folder: LEVER_CACHE=DIR",
        ) from error
