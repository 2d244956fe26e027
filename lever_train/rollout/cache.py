"""The cache of answers: nothing is paid for twice, across runs too.

In go answers under the keys of their prompts (32 bytes), out they come again. The cache of a scorer
is a folder of immutable segments:

    cache/<scope>/seg-<level>-<sha256>.arrow    sorted by key, named after its own bytes

A segment appears by an atomic rename, so a crash loses what was not flushed and harms nothing else,
and any number of processes may write side by side. Segments are mapped, not read: memory stays
bounded at any size. :data:`FANOUT` segments of a level are merged into one of the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lever_data.errors import LeverError
from lever_data.store.files import write_atomic
from lever_train.rollout.answerers.base import Answer

FANOUT = 16
FLUSH_ROWS = 65_536
FLUSH_SECONDS = 15.0  # a crash loses the answers of this long at most
MERGE_ROWS = 1 << 22  # larger segments are left alone: a merge holds all its rows in memory
KEY_BYTES = 32
_WORDS = KEY_BYTES // 8

SCHEMA = pa.schema(
    [
        pa.field("prefix", pa.uint64(), nullable=False),  # the key's first 8 bytes, big-endian
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("log_probs", pa.list_(pa.float64())),
    ]
)
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Segment:
    batch: pa.RecordBatch
    prefix: Words  # [n], ascending
    words: Words  # [n, 4], the whole keys

    def find(self, wanted: Words) -> npt.NDArray[np.int64]:
        """Row of each key [m, 4], -1 where it is not here."""
        rows = np.searchsorted(self.prefix, wanted[:, 0]).astype(np.int64)
        found = np.full(len(wanted), -1, dtype=np.int64)
        open_ = np.arange(len(wanted))
        while len(open_):  # once, unless two keys share 64 bits
            at = rows[open_]
            inside = at < len(self.prefix)
            inside[inside] = self.prefix[at[inside]] == wanted[open_[inside], 0]
            open_, at = open_[inside], at[inside]
            equal = (self.words[at] == wanted[open_]).all(1)
            found[open_[equal]] = at[equal]
            rows[open_] += 1
            open_ = open_[~equal]
        return found


class AnswerCache:
    """The answers of one scope (a scorer with its prompt and parameters).

    Args:
        folder: of the scope; made when something is first written.
        share: called with each segment that holds new answers, once it is on disk.
    """

    def __init__(self, folder: Path, share: Callable[[Path], None] = lambda segment: None) -> None:
        self.folder, self._share = folder, share
        self._segments: dict[str, _Segment] = {}
        self._pending: dict[bytes, Answer] = {}
        self._flushed_at = self._looked_at = time.monotonic()

    def get(self, keys: Sequence[bytes]) -> list[Answer | None]:
        """The answer of each key, ``None`` where it is not known."""
        found: list[Answer | None] = [self._pending.get(k) for k in keys]
        self._look_around()
        open_ = np.array([i for i, a in enumerate(found) if a is None], dtype=np.int64)
        words = _words(b"".join(keys))
        for segment in self._segments.values():
            if not len(open_):
                break
            rows = segment.find(words[open_])
            hit = rows >= 0
            for i, answer in zip(open_[hit], _answers(segment.batch, rows[hit]), strict=True):
                found[int(i)] = answer
            open_ = open_[~hit]
        return found

    def put(self, key: bytes, answer: Answer) -> None:
        """Remember an answer; failures are not remembered, they may be asked again."""
        if answer.text is None:
            return
        self._pending[key] = answer

    def flush_if_due(self) -> None:
        """Write what would else be older than :data:`FLUSH_SECONDS` when this is called next, which
        may be as far off as the last call is."""
        now = time.monotonic()
        since, self._looked_at = now - self._looked_at, now
        if now - self._flushed_at + since >= FLUSH_SECONDS or len(self._pending) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on disk, and merge where segments have become many."""
        self._flushed_at = time.monotonic()
        if self._pending:
            self._share(self._write(_table(self._pending), level=0))
            self._pending = {}
            self._merge()

    def _write(self, table: pa.Table, level: int) -> Path:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(table.num_rows, 1))
        data = sink.getvalue().to_pybytes()
        name = f"seg-{level}-{hashlib.sha256(data).hexdigest()}.arrow"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / name, data)
        except OSError as error:
            raise LeverError(
                f"the answer cache cannot be written ({error.strerror})", where=str(self.folder)
            ) from error
        self._open(name)
        return self.folder / name

    def _look_around(self) -> None:
        """Map segments that have come, by us or by others, and forget those merged away."""
        present = {p.name for p in self.folder.glob("seg-*.arrow")}
        for name in sorted(present - self._segments.keys()):
            self._open(name)
        for name in self._segments.keys() - present:
            del self._segments[name]

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            source = pa.memory_map(str(path))
        except FileNotFoundError:
            return  # merged by another process; its successor is there, or next time
        digest = hashlib.sha256(memoryview(source.read_buffer())).hexdigest()
        if name.removesuffix(".arrow").rsplit("-", 1)[-1] != digest:
            raise LeverError(
                "a segment of the answer cache is damaged",
                where=str(path),
                hint="delete this file; what it held will be asked again",
            )
        source.seek(0)
        batch = pa.ipc.open_file(source).get_batch(0)
        prefix = batch.column("prefix").to_numpy()
        keys = np.frombuffer(batch.column("key").buffers()[1], dtype=">u8")
        self._segments[name] = _Segment(batch, prefix, keys.reshape(-1, _WORDS))

    def _merge(self) -> None:
        """Merge the segments of each full level; one process at a time, the others go on."""
        with (self.folder / ".merge").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self._look_around()
            level = 0
            while names := self._full_level(level):
                rows = [pa.Table.from_batches([self._segments[n].batch]) for n in names]
                self._write(_sorted(pa.concat_tables(rows)), level + 1)
                for name in names:
                    (self.folder / name).unlink(missing_ok=True)
                    self._segments.pop(name, None)
                level += 1

    def _full_level(self, level: int) -> list[str]:
        names = sorted(n for n in self._segments if n.startswith(f"seg-{level}-"))
        total = sum(self._segments[n].batch.num_rows for n in names)
        return names if len(names) >= FANOUT and total <= MERGE_ROWS else []


def cache_folder(root: Path, scope: bytes) -> Path:
    """Where the cache of a scope lies, under ``<store>/cache``."""
    return root / "cache" / hashlib.sha256(scope).hexdigest()[:24]


def open_cache(root: Path, scope: bytes) -> AnswerCache:
    """The cache of a scope in a store's folder."""
    return AnswerCache(cache_folder(root, scope))


def _words(joined: bytes) -> Words:
    return np.frombuffer(joined, dtype=">u8").reshape(-1, _WORDS).astype(np.uint64)


def _answers(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> list[Answer]:
    texts = batch.column("text").take(pa.array(rows)).to_pylist()
    lists = batch.column("log_probs").take(pa.array(rows)).to_pylist()
    return [
        Answer(text, None if values is None else tuple(values))
        for text, values in zip(texts, lists, strict=True)
    ]


def _table(pending: dict[bytes, Answer]) -> pa.Table:
    keys = list(pending)
    answers = pending.values()
    columns = [
        pa.array(_words(b"".join(keys))[:, 0]),
        pa.array(keys, pa.binary(KEY_BYTES)),
        pa.array([a.text for a in answers], pa.string()),
        pa.array([a.log_probs for a in answers], pa.list_(pa.float64())),
    ]
    return _sorted(pa.Table.from_arrays(columns, schema=SCHEMA))


def _sorted(table: pa.Table) -> pa.Table:
    """By key, each key once: two processes may have asked the same."""
    # two keys that share 64 bits may stand in either order; the search looks at both
    order = pc.sort_indices(table, sort_keys=[("prefix", "ascending")])
    table = table.take(order).combine_chunks()
    keys = (
        np.frombuffer(table.column("key").chunk(0).buffers()[1], dtype=">u8")
        if len(table)
        else np.zeros(0, dtype=">u8")
    )
    words = keys.reshape(-1, _WORDS)
    again = np.zeros(len(words), dtype=bool)
    again[1:] = (words[1:] == words[:-1]).all(1)
    return table.filter(pa.array(~again)) if again.any() else table
