"""Answers from an OpenAI-compatible endpoint, such as a vLLM server: the flow of requests.

In go prompts, out come answers: one request a prompt, a bounded number at a time. What may pass is
tried again for as long as the patience lasts (``Retry-After`` is honoured). A prompt the endpoint
refuses for good is a failed answer. An endpoint that answers nothing at all stops the job, which
goes on where it stood when called again. What a request says and how a reply is read stands in
``openai_exchange.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import tenacity

from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, AnswererDownError, ShownFingerprints, Usage
from lever_train.rollout.answerers.openai_exchange import Exchange
from lever_train.rollout.answerers.openai_reply import PassingError, RefusedError

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_BATCHES = 8  # prompts handed over per slot: a slow one does not leave the others idle
_SECOND_CHANCES = 2
_NO_COMPLETION_TRIES = 3  # a body that is no completion may be a proxy's page; not forever


@dataclass
class OpenAIAnswerer:
    """An endpoint. Make one with :meth:`connect`."""

    exchange: Exchange
    _shown: ShownFingerprints = field(default_factory=ShownFingerprints)

    @classmethod
    def connect(cls, url: str, spec: AnswererSpec) -> OpenAIAnswerer:
        """An answerer for the endpoint at ``url`` (``…/v1``); nothing is sent yet.

        Raises:
            UsageError: as :meth:`Exchange.connect` raises it.
        """
        return cls(Exchange.connect(url, spec))

    @property
    def spec(self) -> AnswererSpec:
        """What the user asked for."""
        return self.exchange.spec

    @property
    def name(self) -> str:
        """The model's name; where it is served does not matter."""
        return self.exchange.model

    @property
    def usage(self) -> Usage:
        """What was paid so far."""
        return self.exchange.usage

    @property
    def batch_size(self) -> int:
        """Enough to keep every slot busy."""
        return self.spec.batch_size or self.spec.concurrency * _BATCHES

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters of the request."""
        return self.exchange.generation()

    def provenance(self) -> dict[str, Any]:
        """The server, and what it calls its model."""
        return self.exchange.provenance()

    def fingerprint(self, item: Item) -> bytes:
        """Digest of image, question and answer."""
        return self._shown.of(item)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts.

        Raises:
            AnswererDownError: the endpoint rejects the key or the model, or answered nothing at all
                within the patience; it carries the answers that did come.
        """
        return asyncio.run(self._all(prompts))

    async def _all(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer all; what did not get through has a second chance where the endpoint lives, so
        that an outage costs time and not answers."""
        async with self.exchange.client() as client:
            results = dict(enumerate(await self._side_by_side(client, prompts)))
            for _ in range(_SECOND_CHANCES):
                open_ = [i for i, r in results.items() if isinstance(r, PassingError)]
                if open_:
                    await self._require_alive(client, results)
                    again = await self._side_by_side(client, [prompts[i] for i in open_])
                    results.update(zip(open_, again, strict=True))
        return [self._settled(results[i]) for i in range(len(prompts))]

    async def _side_by_side(
        self, client: httpx.AsyncClient, prompts: Sequence[Prompt]
    ) -> list[Answer | PassingError]:
        """Ask so many at a time; stops all where one fails for good."""
        slots = asyncio.Semaphore(self.spec.concurrency)
        tasks = [asyncio.create_task(self._one(client, slots, p)) for p in prompts]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        done = {i: r for i, r in enumerate(results) if isinstance(r, Answer)}
        for error in results:
            if isinstance(error, LeverError):
                raise AnswererDownError(error, done)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, PassingError):
                raise error
        return [r for r in results if isinstance(r, Answer | PassingError)]

    async def _require_alive(
        self, client: httpx.AsyncClient, results: Mapping[int, Answer | PassingError]
    ) -> None:
        """Ask the smallest question there is; where that fails the endpoint is down."""
        try:
            await self.exchange.greet(client)
        except (PassingError, RefusedError) as error:
            cause = LeverError(
                f"the endpoint does not answer ({error})",
                where=self.exchange.base_url,
                hint="nothing is lost: run the same command again when it is back",
            )
            done = {i: r for i, r in results.items() if isinstance(r, Answer)}
            raise AnswererDownError(cause, done) from error

    def _settled(self, result: Answer | PassingError) -> Answer:
        if isinstance(result, Answer):
            return result
        return Answer(None, error=f"gave up: {result}")

    async def _one(
        self, client: httpx.AsyncClient, slots: asyncio.Semaphore, prompt: Prompt
    ) -> Answer | PassingError:
        """One answer; what did not pass within the patience is returned, not raised."""
        async with slots:
            try:
                async for attempt in self._attempts():
                    with attempt:
                        return await self.exchange.ask(client, prompt)
            except RefusedError as error:
                return Answer(None, error=str(error))
            except PassingError as error:
                return error
            except OSError as error:
                reason = f"an image cannot be read: {error.strerror}: {error.filename}"
                return Answer(None, error=reason)
        raise AssertionError("the attempts end with an answer or an error")

    def _attempts(self) -> tenacity.AsyncRetrying:
        backoff = tenacity.wait_random_exponential(_FIRST_WAIT, _LONGEST_WAIT)
        started = time.monotonic()

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, PassingError) else None
            left = max(0.0, self.spec.patience - (time.monotonic() - started))
            return min(backoff(state) if asked is None else asked, left)

        def stop(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            page = isinstance(error, PassingError) and error.body
            return (
                page and state.attempt_number >= _NO_COMPLETION_TRIES
            ) or time.monotonic() - started >= self.spec.patience

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(PassingError),
            wait=wait,
            stop=stop,
            reraise=True,
        )
