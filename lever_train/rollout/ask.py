"""Ask an answerer, but never twice: the cache first, equal prompts once, the rest of the answerer.

In go prompts, out come their answers in order, with the key each is cached under. What was paid
is counted and reported as it happens. A key is a digest of scorer, prompt, ordered demonstrations
and generation parameters. The cache of a scorer is a folder of immutable segments:

    cache/<scope>/seg-<level>-<sha256>.arrow    sorted by key, named after its own bytes

A segment appears by an atomic rename, so a crash loses what was not flushed and harms nothing else,
and any number of processes may write side by side. Segments are mapped, not read: memory stays
bounded at any size. :data:`FANOUT` segments of a level are merged into one of the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz.distance import Prefix

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt
from lever_data.store.files import write_atomic
from lever_train.rollout.answerers.base import (
    Answer,
    Answerer,
    BatchFlight,
    Endpoint,
    canonical,
)

T = TypeVar("T")
Reply = tuple[bytes | None, Answer]  # with the key it is cached under, where it has one
Talk = Generator[Sequence[Prompt], list[Reply], T]  # asks, is answered, asks again; ends with a T
_TICK = 1.0  # seconds between two looks at the clock while nothing arrives
ENOUGH = 32  # answers after which a share of failures says something


@dataclass
class Tally:
    """What a job has done so far, in answers; ``reasons`` counts failures by what was said."""

    wanted: int = 0
    asked: int = 0
    hits: int = 0  # from the cache, or equal to another prompt that is asked
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def commonest(self) -> str:
        """The commonest reasons of failures with their counts, for a message."""
        return "; ".join(f"{count:,} x {reason}" for reason, count in self.reasons.most_common(3))


@dataclass(eq=False)
class _Turn(Generic[T]):
    """A talk that waits for the answers to its last prompts."""

    talk: Talk[T]
    keys: list[bytes | Answer]
    answers: dict[bytes, Answer]
    open: int


class Asker:
    """An answerer behind a cache.

    Args:
        on_progress: called with the tally as answers come.
        max_failed: the share of failed answers at which asking stops, from :data:`ENOUGH` on.
    """

    def __init__(
        self,
        answerer: Answerer,
        cache: AnswerCache,
        on_progress: Callable[[Tally], None] = lambda tally: None,
        max_failed: float = 1.0,
    ) -> None:
        self.answerer, self.cache = answerer, cache
        self.on_progress, self.max_failed = on_progress, max_failed
        self.tally = Tally()
        self._unreadable = 0
        self._scope = scope(answerer)

    def key(self, prompt: Prompt) -> bytes:
        """sha256 of the scope, the query, the answers whose probability is wanted, and the
        demonstrations in order, by content.

        Raises:
            OSError: an image cannot be read.
        """
        digest = hashlib.sha256(self._scope)
        digest.update(self.answerer.fingerprint(prompt.query))
        digest.update(hashlib.sha256(canonical(prompt.given)).digest())
        for item in prompt.demonstrations:
            digest.update(self.answerer.fingerprint(item))
        return digest.digest()

    def missing(self, prompts: Sequence[Prompt]) -> int:
        """How many answers ``ask`` would pay for."""
        keys = {key for p in prompts if isinstance(key := self._key_or_failure(p), bytes)}
        return sum(answer is None for answer in self.cache.get(list(keys)))

    def ask(self, prompts: Sequence[Prompt]) -> list[Reply]:
        """Answer prompts, in order. An item whose image cannot be read makes a failed answer
        without a key."""

        def talk() -> Talk[list[Reply]]:
            return (yield prompts)

        (found,) = self.serve([talk()])
        return found

    def serve(self, talks: Iterable[Talk[T]]) -> Iterator[T]:
        """Hold talks side by side and yield what each ends with, in the order they end.

        A talk is begun when the answerer would otherwise idle, so prompts of one talk never wait
        for the slowest of another.

        Raises:
            LeverError: the answerer can do no more, or more answers fail than ``max_failed``.
                What was paid for is in the cache.
        """
        coming = iter(talks)
        line: deque[tuple[bytes, Prompt]] = deque()
        waiting: dict[bytes, list[_Turn[T]]] = {}
        flight = (
            self.answerer.flight()
            if isinstance(self.answerer, Endpoint)
            else BatchFlight(self.answerer)
        )
        try:
            while True:
                # at most a batch in line: what is not sent costs memory and saves no time
                while len(line) < flight.room and (talk := next(coming, None)) is not None:
                    yield from self._go_on(talk, line, waiting)
                while line and flight.room:
                    flight.send(*line.popleft())
                if not waiting:
                    return
                arrived = flight.receive(_TICK)
                for key, answer in arrived:
                    self.tally.asked += 1
                    self.cache.put(key, answer)
                    self._note(answer)
                self.cache.flush_if_due()
                self.on_progress(self.tally)
                self._require_success()
                # only now, since what a talk ends with is scored and written before we go on
                for key, answer in arrived:
                    for turn in waiting.pop(key):
                        turn.answers[key] = answer
                        turn.open -= 1
                        if not turn.open:
                            yield from self._go_on(turn.talk, line, waiting, turn)
        finally:
            for key, answer in flight.land():
                self.cache.put(key, answer)
            self.cache.flush()
            for turn in (turn for turns in waiting.values() for turn in turns):
                turn.talk.close()  # it may hold a lock, which must not live as long as an error

    def _go_on(
        self,
        talk: Talk[T],
        line: deque[tuple[bytes, Prompt]],
        waiting: dict[bytes, list[_Turn[T]]],
        turn: _Turn[T] | None = None,
    ) -> Iterator[T]:
        """Take a talk to where it must wait for the answerer, or to its end, which is yielded."""
        while True:
            try:
                prompts = next(talk) if turn is None else talk.send(self._replies(turn))
            except StopIteration as end:
                yield end.value
                return
            keys = [self._key_or_failure(p) for p in prompts]
            wanted = {k: p for k, p in zip(keys, prompts, strict=True) if isinstance(k, bytes)}
            found = zip(wanted, self.cache.get(list(wanted)), strict=True)
            answers = {k: answer for k, answer in found if answer is not None}
            todo = sorted(
                (k for k in wanted if k not in answers), key=lambda k: shown_first(wanted[k])
            )
            turn = _Turn(talk, keys, answers, len(todo))
            line.extend((k, wanted[k]) for k in todo if k not in waiting)
            fresh = sum(k not in waiting for k in todo)
            for k in todo:
                waiting.setdefault(k, []).append(turn)
            self.tally.wanted += len(prompts)
            self.tally.hits += len(prompts) - fresh - sum(isinstance(k, Answer) for k in keys)
            if todo:
                return

    def _replies(self, turn: _Turn[T]) -> list[Reply]:
        found: list[Reply] = []
        for key in turn.keys:
            answer = key if isinstance(key, Answer) else turn.answers[key]
            if isinstance(key, Answer):
                self._unreadable += 1
                self._note(answer)
            found.append((key if isinstance(key, bytes) else None, answer))
        return found

    def _note(self, answer: Answer) -> None:
        if answer.text is None:
            self.tally.failed += 1
            self.tally.reasons[answer.error or "no reason given"] += 1

    def _require_success(self) -> None:
        tried = self.tally.asked + self.tally.hits + self._unreadable
        if tried >= ENOUGH and self.tally.failed > self.max_failed * tried:
            raise LeverError(
                f"{self.tally.failed:,} of {tried:,} answers failed",
                value=self.tally.commonest(),
                hint="mend the cause and run the same command again: what was paid is kept; "
                "--max-failed SHARE lets more fail",
            )

    def _key_or_failure(self, prompt: Prompt) -> bytes | Answer:
        try:
            return self.key(prompt)
        except OSError as error:
            return Answer(
                None, error=f"an image cannot be read: {error.strerror}: {error.filename}"
            )


def shown_first(prompt: Prompt) -> tuple[int, ...]:
    """By this prompts are sent: those that begin alike are neighbours, so that a server that keeps
    what it has read of a prompt reads the beginning once."""
    return tuple(item.example_id for item in prompt.demonstrations)


def shared_beginnings(texts: Sequence[str]) -> float:
    """The share of all characters that stand at the beginning of the text before, in [0, 1]: what a
    cache of prefixes can serve."""
    same = sum(Prefix.similarity(before, text) for before, text in pairwise(texts))
    return same / max(1, sum(map(len, texts)))


def scope(answerer: Answerer) -> bytes:
    """What all keys of an answerer share: its name and everything :meth:`generation` says."""
    return canonical([answerer.name, answerer.generation()])


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
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            self._write(_table(self._pending), level=0)
            self._pending = {}
            self._merge()

    def _write(self, table: pa.Table, level: int) -> None:
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


def open_cache(root: Path, scope: bytes) -> AnswerCache:
    """The cache of a scope under ``<store>/cache``."""
    return AnswerCache(root / "cache" / hashlib.sha256(scope).hexdigest()[:24])


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
