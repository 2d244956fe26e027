"""A run that is being made: a folder under staging/ that becomes a run in one step, or vanishes.

In go files and a manifest, by whoever fills the folder (``writer.py``, or a copy); out comes the
committed run, in the store's folder or in its bucket.
"""

from __future__ import annotations

import shutil
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lever_data.errors import LeverError
from lever_data.store import staging
from lever_data.store.files import fsync_dir, fsync_tree
from lever_data.store.locks import Lock
from lever_data.store.manifest import Run

if TYPE_CHECKING:
    from lever_data.store.store import Store


class Draft:
    """Leaving the ``with`` block without ``publish`` discards it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.staging_folder / uuid.uuid4().hex
        self._lock = Lock(staging.lock_of(self.folder))

    def __enter__(self) -> Self:
        with staging.writable(self.store.path), staging.locked(self.store.staging_folder):
            self._lock.take()
            self.folder.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            # under the one lock, or a sweeper could meet the folder alive and its lock gone
            with staging.writable(self.store.path), staging.locked(self.store.staging_folder):
                staging.lock_of(self.folder).unlink()
        finally:
            self._lock.release()
        if isinstance(error, OSError) and not isinstance(error, LeverError):
            raise LeverError(
                f"writing the run failed ({error.strerror or error}); nothing was committed",
                where=str(self.store.path),
            ) from error

    def publish(self, run: str) -> Run:
        """Commit the folder as the run of this id; returns it.

        A second writer of the same run that comes too late gets the run already there: both
        wrote the same rows.

        Raises:
            LeverError: a bucket has it with other bytes, or it was removed meanwhile.
        """
        fsync_tree(self.folder)
        if self.store.mirror is not None:
            self.store.mirror.publish(self.folder, run)
        target = self.store.path / "runs" / f"run={run}"
        try:
            self.folder.rename(target)
        except OSError:
            if not target.exists():
                raise
        fsync_dir(target.parent)
        self.store.write_views_sql()
        found = self.store.committed(run)
        if found is None:
            raise LeverError("the run was removed while it was committed", value=target.name)
        return found
