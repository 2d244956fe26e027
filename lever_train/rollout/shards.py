"""Durable shards: a finished one is in the store for good, a missing one is made once.

    jobs/<key>/shard-00012/{candidates,queries}.parquet, report.json

A shard appears as a whole, an entry of the job's workplace. Any number of processes may work on one
job, on one machine or on several that see the store: each makes the shards nobody else is making.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError, reason
from lever_data.store.schema import todays, under_todays_names
from lever_data.store.workplace import Workplace
from lever_train.rollout.ask import Asker, Talk

TABLES = ("candidates", "queries")


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
        place: the job's workplace.
        count: how many shards the job has.
        is_over: whether the job's run is committed, by whomever; nothing is made from then on.
    """

    def __init__(
        self, place: Workplace, count: int, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.place = place
        self.count = count
        self._is_over = is_over

    def missing(self, indices: Sequence[int] | None = None) -> list[int]:
        """Those of ``indices`` (all where ``None``) that are not done."""
        wanted, done = range(self.count) if indices is None else indices, self.place.entries()
        return [i for i in wanted if _name(i) not in done]

    def make_all(
        self, indices: Sequence[int], talk: Callable[[int], Talk[ShardRows]], asker: Asker
    ) -> Iterator[int]:
        """Make the missing shards of ``indices`` side by side, and yield each once it is on disk.

        Those another process is making are waited for at the end, one by one: who waits holds no
        shard that others may wait for.
        """
        for index in asker.serve(self._talk(i, talk, wait=False) for i in self.missing(indices)):
            if self.place.has(_name(index)):
                yield index
        for index in self.missing(indices):
            yield from asker.serve([self._talk(index, talk, wait=True)])

    def _talk(self, index: int, talk: Callable[[int], Talk[ShardRows]], *, wait: bool) -> Talk[int]:
        """Make one shard, unless another process does or did."""
        with self.place.claimed(_name(index), wait=wait) as mine:
            if mine and not self.place.has(_name(index)) and not self._is_over():
                self._write(index, (yield from talk(index)))
        return index

    def reopen(self, indices: Sequence[int]) -> None:
        """Forget those of ``indices`` that hold failed answers: they are asked anew."""
        for name, report in self._reports(sorted(self.place.entries() & set(map(_name, indices)))):
            if report.failed:
                self.place.forget(name)

    def report(self) -> Report:
        """The sum over the shards that are done.

        Raises:
            ShardsGoneError: one of them was deleted while it was read.
        """
        reports = self._reports(sorted(self.place.entries()))
        return sum((report for _, report in reports), start=Report())

    def _reports(self, names: Sequence[str]) -> list[tuple[str, Report]]:
        try:
            return [
                (name, Report(**json.loads((folder / "report.json").read_bytes())))
                for name, folder in zip(names, self.place.open(names), strict=True)
            ]
        except FileNotFoundError:
            raise ShardsGoneError from None

    def tables(self, table: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """A table's rows, shard by shard in order.

        Raises:
            LeverError: a shard cannot be read.
            ShardsGoneError: a shard is not there any more.
        """
        for index in range(self.count):
            try:
                (folder,) = self.place.open([_name(index)])
                path = folder / f"{table}.parquet"
                found = pq.read_table(path)
                batches = map(under_todays_names, found.to_batches())
                yield pa.Table.from_batches(batches, todays(found.schema)).cast(schema)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise ShardsGoneError from None
                raise LeverError(
                    f"a finished shard cannot be read ({reason(error)})",
                    where=str(path),
                    hint="delete its folder and run the command again: it will be made anew",
                ) from error

    def remove(self) -> None:
        """Delete all of them: their rows are in a committed run."""
        self.place.remove()

    def _write(self, index: int, made: ShardRows) -> None:
        temporary = self.place.folder / f".{uuid.uuid4().hex}"
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
            self.place.add(_name(index), temporary)
        except OSError as error:
            raise LeverError(
                f"the shard cannot be written ({error.strerror}); those before it are kept",
                where=f"{self.place.where}/{_name(index)}",
                hint="run the same command again to go on",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def probing(self, index: int) -> Iterator[bool]:
        """Hold the claim of the first prompts, of a shard that nobody makes; False where somebody
        does, or has made it since. Of several processes one pays for them, and the others find its
        answers."""
        with (
            self.place.claimed("probe", wait=True),
            self.place.claimed(_name(index), wait=False) as mine,
        ):
            yield mine and not self.place.has(_name(index))


def _name(index: int) -> str:
    return f"shard-{index:05d}"
