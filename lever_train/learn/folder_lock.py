"""The lock of a folder that a training writes: one training at a time.

It is an flock on a file in the folder: the kernel releases it with the process, however it ends, so
a killed training bars nobody, and the file it leaves behind means nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from lever_data.errors import LeverError
from lever_data.store.files import discard

LOCK = ".training.lock"


class FolderLock:
    """The lock of one folder, which must be there when it is taken."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._handle: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._handle is not None

    def take(self) -> None:
        """Take the lock and keep it until :meth:`release`.

        Raises:
            LeverError: another process holds it, or the file cannot be made or locked.
        """
        while self._handle is None:
            handle = -1
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if handle >= 0:
                    os.close(handle)
                raise self._refused(error) from error
            if self._is_ours(handle):
                self._handle = handle
            else:  # who held it before deleted it meanwhile
                os.close(handle)

    def release(self) -> None:
        """Delete the file and let the next training begin; nothing where it is not held."""
        if self._handle is not None:
            discard(self.path)
            os.close(self._handle)
            self._handle = None

    def _is_ours(self, handle: int) -> bool:
        """Whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def _refused(self, error: OSError) -> LeverError:
        if isinstance(error, BlockingIOError):
            return LeverError(
                "another training writes --out at this moment",
                where=str(self.path.parent),
                hint="wait until it ends, or name another --out",
            )
        return LeverError(f"--out cannot be locked ({error.strerror})", where=str(self.path))
