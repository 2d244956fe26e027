"""Locks between processes, all of one kind: an flock on a file, by ``filelock``.

The kernel lets a lock go with the process that holds it, however it ends, so a killed one bars
nobody, and the file that stays behind means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock


class Lock:
    """The lock of one file, which is made where it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: FileLock | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this object holds it."""
        return self._held is not None

    def take(self, *, wait: bool = True) -> bool:
        """Take it and keep it until :meth:`release`; False where another holds it and we do not
        wait.

        Raises:
            OSError: the file cannot be made or locked; a file system without flock is refused.
        """
        from filelock import FileLock, Timeout  # 60 ms, which commands that only read do not pay

        lock = FileLock(
            self.path, blocking=wait, mode=0o644, thread_local=False, fallback_to_soft=False
        )
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held = lock
        return True

    def release(self) -> None:
        """Let it go; nothing where it is not held."""
        if self._held is not None:
            self._held.release()
            self._held = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file while the block lasts; waits for it."""
    lock = Lock(path)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock of a file; a missing file is not held."""
    if not path.exists():
        return False
    lock = Lock(path)
    if not lock.take(wait=False):
        return True
    lock.release()
    return False
