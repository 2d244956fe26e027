"""The lock of a folder that a training writes: one training at a time.

It is an flock on a file in the folder: the kernel releases it with the process, however it ends, so
a killed training bars nobody, and the file that stays behind means nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from lever_data.errors import LeverError

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
        handle = -1
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            if isinstance(error, BlockingIOError):
                raise LeverError(
                    "another training writes --out at this moment",
                    where=str(self.path.parent),
                    hint="wait until it ends, or name another --out",
                ) from None
            raise LeverError(
                f"--out cannot be locked ({error.strerror})", where=str(self.path)
            ) from error
        self._handle = handle

    def release(self) -> None:
        """Let the next training begin; nothing where it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
