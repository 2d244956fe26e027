"""Ask an answerer, but never twice: the cache first, equal prompts once, the rest in batches.

In go prompts, out come their answers in order, with the key each is cached under. What was paid
is counted and reported as it happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lever_data.items.prompts import Prompt
from lever_train.rollout.answerers.base import Answer, Answerer, AnswererDownError, canonical
from lever_train.rollout.cache import AnswerCache


@dataclass
class Tally:
    """What a job has done so far, in answers."""

    wanted: int = 0
    asked: int = 0
    hits: int = 0  # from the cache, or equal to another prompt of the same shard
    failed: int = 0


@dataclass
class Asker:
    """An answerer behind a cache.

    ``on_progress`` is called with the tally after every batch.
    """

    answerer: Answerer
    cache: AnswerCache
    on_progress: Callable[[Tally], None] = lambda tally: None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._scope = scope(self.answerer)

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

    def ask(self, prompts: Sequence[Prompt]) -> list[tuple[bytes | None, Answer]]:
        """Answer prompts: (key, answer) each, in order. An item whose image cannot be read makes
        a failed answer without a key."""
        keys = [self._key_or_failure(p) for p in prompts]
        wanted = {k: p for k, p in zip(keys, prompts, strict=True) if isinstance(k, bytes)}
        known = dict(zip(wanted, self.cache.get(list(wanted)), strict=True))
        todo = [k for k, answer in known.items() if answer is None]
        self.tally.wanted += len(prompts)
        self.tally.hits += len(prompts) - len(todo) - sum(isinstance(k, Answer) for k in keys)
        self.on_progress(self.tally)
        try:
            for start in range(0, len(todo), self.answerer.batch_size):
                batch = todo[start : start + self.answerer.batch_size]
                known.update(self._pay(batch, [wanted[k] for k in batch]))
        finally:
            self.cache.flush()
        found: list[tuple[bytes | None, Answer]] = []
        for key in keys:
            answer = key if isinstance(key, Answer) else known[key]
            assert answer is not None
            self.tally.failed += answer.text is None
            found.append((key if isinstance(key, bytes) else None, answer))
        return found

    def _pay(self, keys: list[bytes], prompts: list[Prompt]) -> dict[bytes, Answer]:
        try:
            answers = self.answerer.answer(prompts)
        except AnswererDownError as error:
            for index, answer in error.done.items():
                self.cache.put(keys[index], answer)
            raise
        for key, answer in zip(keys, answers, strict=True):
            self.cache.put(key, answer)
        self.tally.asked += len(keys)
        self.on_progress(self.tally)
        return dict(zip(keys, answers, strict=True))

    def _key_or_failure(self, prompt: Prompt) -> bytes | Answer:
        try:
            return self.key(prompt)
        except OSError as error:
            return Answer(
                None, error=f"an image cannot be read: {error.strerror}: {error.filename}"
            )


def scope(answerer: Answerer) -> bytes:
    """What all keys of an answerer share: its name and everything :meth:`generation` says."""
    return canonical([answerer.name, answerer.generation()])
