"""Answers from Ray: prompts on their way to actors, each with the answerer loaded once.

In go prompts as :class:`Asker` sends them, so that cache, order and counts are those of one
process; out come their answers. Those in flight with a worker that is lost are asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lever_data.items.prompts import Prompt
from lever_data.items.task import Task
from lever_train.inputs.actors import cluster
from lever_train.options.engine import Engine
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers import Answer, Surroundings, make_answerer
from lever_train.rollout.answerers.base import Flight


class AnswerWorker:
    """An actor that answers."""

    def __init__(self, spec: AnswererSpec, task: Task) -> None:
        self.answerer = make_answerer(spec, Surroundings(task=task))

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch, in order."""
        return self.answerer.answer(prompts)


@contextmanager
def answering(
    spec: AnswererSpec, task: Task, batch_size: int, how: Engine
) -> Iterator[Callable[[], Flight]]:
    """Actors that answer, and how prompts travel to them.

    Raises:
        UsageError: Ray is not installed, or the cluster has too few GPUs.
        LeverError: a worker failed, with what it raised.
    """
    with cluster(how) as ray:
        worker = ray.remote(AnswerWorker).options(
            num_gpus=how.gpus_per_worker or None,
            max_restarts=-1,
            max_task_retries=-1,
            # or all of them may sit on one machine: without GPUs they reserve nothing
            scheduling_strategy="SPREAD",
        )
        actors = [worker.remote(spec, task) for _ in range(how.workers)]
        yield lambda: ActorFlight(ray, actors, batch_size)


class ActorFlight:
    """Prompts on their way to actors, a batch in each."""

    def __init__(self, ray: Any, actors: Sequence[Any], batch_size: int) -> None:
        self._ray, self._batch_size = ray, batch_size
        self._idle, self._most = list(actors), len(actors) * batch_size
        self._line: list[tuple[bytes, Prompt]] = []
        self._away: dict[Any, tuple[Any, list[bytes]]] = {}  # by what Ray will answer

    @property
    def room(self) -> int:
        """What full batches lack, one in each actor and one in line."""
        away = sum(len(tickets) for _, tickets in self._away.values())
        return max(0, self._most + self._batch_size - away - len(self._line))

    def send(self, ticket: bytes, prompt: Prompt) -> None:
        """Put a prompt in line; a full batch leaves at once where an actor is idle."""
        self._line.append((ticket, prompt))
        if len(self._line) >= self._batch_size:
            self._leave()

    def _leave(self) -> None:
        if self._idle and self._line:
            batch, self._line = self._line[: self._batch_size], self._line[self._batch_size :]
            actor = self._idle.pop()
            promised = actor.answer.remote([prompt for _, prompt in batch])
            self._away[promised] = actor, [ticket for ticket, _ in batch]

    def receive(self, wait: float) -> list[tuple[bytes, Answer]]:
        """The answers of the first batch that is ready, none where none is in time."""
        while self._idle and self._line:
            self._leave()
        ready, _ = self._ray.wait(list(self._away), num_returns=1, timeout=wait)
        found: list[tuple[bytes, Answer]] = []
        for promised in ready:
            actor, tickets = self._away.pop(promised)
            self._idle.append(actor)
            found += zip(tickets, self._ray.get(promised), strict=True)
        return found

    def land(self) -> list[tuple[bytes, Answer]]:
        """Nothing: what is away is not waited for."""
        return []
