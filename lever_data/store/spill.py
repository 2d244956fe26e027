"""Where DuckDB spills what does not fit its memory, and how what killed processes left is swept.

A process has one folder in the temporary folder of the machine and holds a lock in it; the next
process that needs one deletes those whose lock nobody holds. Tens of gigabytes may lie there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lever_data.store.locks import Lock, is_held

_PREFIX = "lever-spill-"
_own: dict[int, tuple[Path, Lock]] = {}  # by process: a forked one makes its own


@contextmanager
def spill_folder() -> Iterator[Path]:
    """A fresh folder's path, deleted with all in it when the block ends."""
    folder = new_spill_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_spill_folder() -> Path:
    """The path of a folder nobody has made yet; it goes when the process ends, or soon after."""
    if os.getpid() not in _own:
        _own[os.getpid()] = _begin()
    return _own[os.getpid()][0] / uuid.uuid4().hex


def _begin() -> tuple[Path, Lock]:
    root = Path(tempfile.gettempdir())
    _sweep(root)
    folder = root / f"{_PREFIX}{uuid.uuid4().hex}"
    # locked before it has its name: nobody meets it without its owner
    made = Path(tempfile.mkdtemp(prefix=".lever-spill-", dir=root))
    lock = Lock(made / "lock")
    lock.take()
    made.rename(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, lock


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another sweeper may be at it too
            if folder.stat().st_uid == os.getuid() and not is_held(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)
