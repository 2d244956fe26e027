"""Durable shards: a finished one is on disk for good, a missing one is made once.

    <store>/jobs/<key>/shard-00012/{candidates,queries}.parquet, report.json
    <store>/jobs/<key>/shard-00012.lock                          held while it is being made

A shard appears by an atomic rename of a folder flushed to disk. Any number of processes may work
on one job: each makes the shards nobody else is making.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError, reason
from lever_data.store.files import fsync_dir, fsync_tree
from lever_train.rollout.ask import Asker, Talk

TABLES = ("candidates", "queries")
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Report:
    """Counts of one shard or, added up, of a job; all in candidates but ``queries``."""

    queries: int = 0
    candidates: int = 0
    file: int = 0
    fallback: int = 0
    failed: int = 0

    def __add__(self, other: Report) -> Report:
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        return Report(*sums)


@dataclass(frozen=True)
class ShardRows:
    """A shard's rows."""

    tables: dict[str, pa.Table]
    report: Report


class ShardsGoneError(Exception):
    """The shards were deleted meanwhile: another process committed their run."""


class ShardFolder:
    """The shards of one job.

    Args:
        folder: ``<store>/jobs/<key>``.
        count: how many shards the job has.
        is_over: whether the job's run is committed, by whomever; nothing is made from then on.
    """

    def __init__(
        self, folder: Path, count: int, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.folder = folder
        self.count = count
        self._is_over = is_over

    def path(self, index: int) -> Path:
        """Where a shard lies once it is done."""
        return self.folder / f"shard-{index:05d}"

    def missing(self, indices: Sequence[int] | None = None) -> list[int]:
        """Those of ``indices`` (all where ``None``) that are not done."""
        wanted = range(self.count) if indices is None else indices
        return [i for i in wanted if not self.path(i).is_dir()]

    def make_all(
        self, indices: Sequence[int], talk: Callable[[int], Talk[ShardRows]], asker: Asker
    ) -> Iterator[int]:
        """Make the missing shards of ``indices`` side by side, and yield each once it is on disk.

        Those another process is making are waited for at the end, one by one: who waits holds no
        shard that others may wait for.
        """
        for index in asker.serve(self._talk(i, talk, wait=False) for i in self.missing(indices)):
            if self.path(index).is_dir():
                yield index
        for index in self.missing(indices):
            yield from asker.serve([self._talk(index, talk, wait=True)])

    def _talk(self, index: int, talk: Callable[[int], Talk[ShardRows]], *, wait: bool) -> Talk[int]:
        """Make one shard, unless another process does or did."""
        with self._claimed(index, wait=wait) as mine:
            if mine and not self.path(index).is_dir() and not self._is_over():
                self._write(index, (yield from talk(index)))
        return index

    def reopen(self, indices: Sequence[int]) -> None:
        """Forget those of ``indices`` that hold failed answers: they are asked anew."""
        for path in self.folder.glob("shard-*/report.json"):
            mine = int(path.parent.name.removeprefix("shard-")) in indices
            if mine and json.loads(path.read_bytes())["failed"]:
                self._bury(path.parent)

    def report(self) -> Report:
        """The sum over the shards that are done.

        Raises:
            ShardsGoneError: one of them was deleted while it was read.
        """
        total = Report()
        try:
            for path in sorted(self.folder.glob("shard-*/report.json")):
                total += Report(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise ShardsGoneError from None
        return total

    def tables(self, table: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """A table's rows, shard by shard in order.

        Raises:
            LeverError: a shard cannot be read.
            ShardsGoneError: a shard is not there any more.
        """
        for index in range(self.count):
            path = self.path(index) / f"{table}.parquet"
            try:
                yield pq.read_table(path).cast(schema)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise ShardsGoneError from None
                raise LeverError(
                    f"a finished shard cannot be read ({reason(error)})",
                    where=str(path),
                    hint="delete its folder and run the command again: it will be made anew",
                ) from error

    def remove(self) -> None:
        """Delete the job's folder: its rows are in a committed run.

        It is renamed first, so that a crash leaves no shard that only looks finished; what a crash
        left of an earlier removal goes too.
        """
        self._bury(self.folder)

    def _bury(self, folder: Path) -> None:
        with suppress(FileNotFoundError):  # never made, or another process was first
            folder.rename(self.folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}"))
        for left in self.folder.parent.glob(f"{_REMOVED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _write(self, index: int, made: ShardRows) -> None:
        temporary = self.folder / f".{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            for name, rows in made.tables.items():
                pq.write_table(
                    rows,
                    temporary / f"{name}.parquet",
                    compression="zstd",
                    write_page_checksum=True,
                )
            (temporary / "report.json").write_text(json.dumps(asdict(made.report)))
            fsync_tree(temporary)
            temporary.rename(self.path(index))
            fsync_dir(self.folder)
        except OSError as error:
            raise LeverError(
                f"the shard cannot be written ({error.strerror}); those before it are kept",
                where=str(self.path(index)),
                hint="run the same command again to go on",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Hold the lock of the first prompts: of several processes one pays for them, and the
        others find its answers."""
        with self._locked("probe", wait=True):
            yield

    @contextmanager
    def _claimed(self, index: int, *, wait: bool) -> Iterator[bool]:
        with self._locked(self.path(index).name, wait=wait) as mine:
            yield mine

    @contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a lock of the job; the kernel lets it go when the process dies."""
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
