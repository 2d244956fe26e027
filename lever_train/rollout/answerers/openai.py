"""Answers from an OpenAI-compatible endpoint, such as a vLLM server: the flow of requests.

In go prompts, out come answers as they arrive: one request a prompt, ``concurrency`` at a time, the
next one sent the moment a slot is free. What may pass is tried again (``Retry-After`` is honoured).
A prompt that the endpoint refuses, or that alone does not get through within the patience, is a
failed answer. An endpoint that answers nothing at all for as long as the patience lasts stops the
job, which goes on where it stood when called again. What a request says and how a reply is read
stands in ``openai_exchange.py``.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt, Template
from lever_data.items.task import Task
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, ShownFingerprints, Usage, scorer_name
from lever_train.rollout.answerers.openai_exchange import Exchange
from lever_train.rollout.answerers.openai_reply import PassingError, RefusedError
from lever_train.rollout.answerers.outages import silent_since

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a prompt is sent again
_AHEAD = 8  # prompts in line per slot: none idles while the caller scores or writes
_GATHERED = 0.02  # seconds in which answers are gathered while others are in line
_PAGES = 3  # a body that is not a completion may be a proxy's page: after so many, look closer
_GREETING = 10.0  # seconds that the smallest question may take
_SAY_EVERY = 30.0  # seconds between two lines about the same outage
_LOG = logging.getLogger(__name__)


@dataclass
class OpenAIAnswerer:
    """An endpoint. Make one with :meth:`connect`."""

    exchange: Exchange
    _shown: ShownFingerprints = field(default_factory=ShownFingerprints)

    @classmethod
    def connect(cls, url: str, spec: AnswererSpec, task: Task | None = None) -> OpenAIAnswerer:
        """An answerer for the endpoint at ``url`` (``…/v1``); nothing is sent yet.

        Raises:
            UsageError: as :meth:`Exchange.connect` raises it.
        """
        return cls(Exchange.connect(url, spec, task))

    @property
    def spec(self) -> AnswererSpec:
        """What the user asked for."""
        return self.exchange.spec

    @property
    def name(self) -> str:
        """The model's name and its prompt's; where it is served does not matter."""
        return scorer_name(self.exchange.model, self.spec, self.exchange.template)

    @property
    def template(self) -> Template:
        """The words of its prompts."""
        return self.exchange.template

    @property
    def usage(self) -> Usage:
        """What was paid so far."""
        return self.exchange.usage

    @property
    def batch_size(self) -> int:
        """Prompts in flight and in line."""
        return self.spec.batch_size or self.spec.concurrency * _AHEAD

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters of the request."""
        return self.exchange.generation()

    def provenance(self) -> dict[str, Any]:
        """The server, and what it calls its model."""
        return self.exchange.provenance()

    def fingerprint(self, item: Item) -> bytes:
        """Digest of image, question and answer."""
        return self._shown.of(item)

    def flight(self) -> EndpointFlight:
        """Requests on their way, until it lands."""
        return EndpointFlight(self.exchange, self.batch_size)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts, in order.

        Raises:
            LeverError: as :meth:`EndpointFlight.receive` raises it.
        """
        found: dict[bytes, Answer] = {}
        flight = self.flight()
        try:
            for number, prompt in enumerate(prompts):
                flight.send(b"%d" % number, prompt)
            while len(found) < len(prompts):
                found.update(flight.receive(1.0))
        finally:
            flight.land()
        return [found[b"%d" % number] for number in range(len(prompts))]


class EndpointFlight:
    """Requests on their way. An event loop in a thread of its own keeps them flowing while the
    caller proposes, scores and writes."""

    def __init__(self, exchange: Exchange, capacity: int) -> None:
        self._exchange, self._capacity = exchange, capacity
        self._open = 0
        self._line: asyncio.Queue[tuple[bytes, Prompt]] = asyncio.Queue()
        self._greeter = asyncio.Lock()
        self._arrived: queue.SimpleQueue[tuple[bytes, Answer] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._flying = self._loop.create_task(self._fly())
        self._thread = threading.Thread(target=self._run, daemon=True)
        # what the endpoint as a whole does: since when nothing has come through, if so
        self._failing_since = silent_since(exchange.base_url)
        self._said = -_SAY_EVERY
        self._thread.start()

    @property
    def room(self) -> int:
        """How many more prompts are wanted."""
        return max(0, self._capacity - self._open)

    def send(self, ticket: bytes, prompt: Prompt) -> None:
        """Hand a prompt over."""
        self._open += 1
        with suppress(RuntimeError):  # the loop has ended: `receive` says why
            self._loop.call_soon_threadsafe(self._line.put_nowait, (ticket, prompt))

    def receive(self, wait: float) -> list[tuple[bytes, Answer]]:
        """What has arrived; waits at most ``wait`` seconds for the first.

        Raises:
            LeverError: the endpoint rejects the key or the model, or is down. What arrived before
                is received first.
        """
        found: list[tuple[bytes, Answer]] = []
        with suppress(queue.Empty):
            while one := self._arrived.get(timeout=0 if found else wait):
                if not found and self._open > 2 * self._exchange.spec.concurrency:
                    # no slot idles meanwhile, and to wake for every answer takes the loop's time
                    time.sleep(_GATHERED)
                found.append(one)
        self._open -= len(found)
        if not found and self._error is not None:
            raise self._error
        return found

    def land(self) -> list[tuple[bytes, Answer]]:
        """Stop asking; what has arrived meanwhile, whatever became of the rest."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._flying.cancel)
        self._thread.join()
        self._error = None
        return self.receive(0)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._flying]))
        if not self._flying.cancelled():
            error = self._flying.exception()  # of several the first: it stopped the others
            self._error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        self._arrived.put(None)  # nothing more comes
        self._loop.close()

    async def _fly(self) -> None:
        async with self._exchange.client() as client, asyncio.TaskGroup() as slots:
            for _ in range(self._exchange.spec.concurrency):
                slots.create_task(self._slot(client))

    async def _slot(self, client: httpx.AsyncClient) -> None:
        while True:
            ticket, prompt = await self._line.get()
            self._arrived.put((ticket, await self._one(client, prompt)))

    async def _one(self, client: httpx.AsyncClient, prompt: Prompt) -> Answer:
        """Ask until there is an answer or the patience is over."""
        first: float | None = None  # when this prompt first failed
        tries = 0
        while True:
            try:
                answer = await self._exchange.ask(client, prompt)
                self._failing_since = None
                return answer
            except RefusedError as error:
                self._failing_since = None  # a sign of life
                return Answer(None, error=str(error))
            except OSError as error:
                reason = f"an image cannot be read: {error.strerror}: {error.filename}"
                return Answer(None, error=reason)
            except PassingError as error:
                tries += 1
                first = first or time.monotonic()
                self._note(error)
                if await self._gives_up(client, error, first, tries):
                    return Answer(None, error=f"gave up: {error}")
                await asyncio.sleep(self._wait(error, first, tries))

    def _note(self, error: PassingError) -> None:
        """A failure that may pass: since when, and a line about it at once and now and then."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._said >= _SAY_EVERY:
            self._said = now
            _LOG.warning(
                "%s does not answer (%s); asking again, for at most %g s",
                self._exchange.base_url,
                error,
                self._exchange.spec.patience,
            )

    async def _gives_up(
        self, client: httpx.AsyncClient, error: PassingError, first: float, tries: int
    ) -> bool:
        """Whether this prompt is lost while others get through.

        Raises:
            LeverError: nothing gets through.
        """
        page = error.body and tries % _PAGES == 0
        if not (page or self._is_over(first) or self._is_over(self._failing_since)):
            return False
        async with self._greeter:  # one at a time: what the first hears holds for the rest
            alive = self._failing_since is None or await self._greets(client)
        if alive:
            self._failing_since = None
            return page or self._is_over(first)
        if self._is_over(self._failing_since):
            raise LeverError(
                f"the endpoint does not answer ({error})",
                where=self._exchange.base_url,
                hint="nothing is lost: run the same command again when it is back",
            )
        return self._is_over(first)

    def _is_over(self, since: float | None) -> bool:
        return since is not None and time.monotonic() - since >= self._exchange.spec.patience

    async def _greets(self, client: httpx.AsyncClient) -> bool:
        """Whether the smallest question there is gets a reply."""
        try:
            async with asyncio.timeout(_GREETING):
                await self._exchange.greet(client)
        except RefusedError:
            return True
        except (PassingError, TimeoutError):
            return False
        return True

    def _wait(self, error: PassingError, first: float, tries: int) -> float:
        """Seconds until the next try: longer each time, as long as the endpoint asks, but not
        beyond the patience."""
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(tries - 1, 10))
        backoff = random.uniform(0.5, 1.0) * longest
        since = first if self._failing_since is None else min(first, self._failing_since)
        left = since + self._exchange.spec.patience - time.monotonic()
        return max(0.0, min(max(backoff, error.wait or 0.0), left))
