"""Ask an answerer, but never twice: the cache first, equal prompts once, the rest of the answerer.

In go prompts, out come their answers in order, with the key each is cached under. What was paid
is counted and reported as it happens. A key is a digest of scorer, prompt, ordered demonstrations
and generation parameters.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

from rapidfuzz.distance import Prefix

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt
from lever_train.rollout.answerers.base import (
    Answer,
    Answerer,
    BatchFlight,
    Endpoint,
    Flight,
    canonical,
)
from lever_train.rollout.cache import AnswerCache

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
        flight: how prompts travel to the answerer, where not as it says itself.
    """

    def __init__(
        self,
        answerer: Answerer,
        cache: AnswerCache,
        on_progress: Callable[[Tally], None] = lambda tally: None,
        max_failed: float = 1.0,
        flight: Callable[[], Flight] | None = None,
    ) -> None:
        self.answerer, self.cache = answerer, cache
        self.on_progress, self.max_failed = on_progress, max_failed
        self.tally = Tally()
        self._flight = flight
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
        if self._flight is not None:
            flight = self._flight()
        elif isinstance(self.answerer, Endpoint):
            flight = self.answerer.flight()
        else:
            flight = BatchFlight(self.answerer)
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
