"""Answers from an OpenAI-compatible chat endpoint with images, such as a vLLM server.

In go prompts, out come chat completions: one request a prompt, a bounded number at a time, greedy
(temperature 0). What may pass is tried again for as long as the patience lasts: refused or broken
connections, timeouts, 408, 425, 429 and 5xx (``Retry-After`` is honoured), and bodies that are no
completion. A prompt the endpoint refuses for good (400, 413, 422) is a failed answer. An endpoint
that answers nothing at all stops the job, which goes on where it stood when called again.

The key comes from ``OPENAI_API_KEY``; it stands in no message and no answer.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tenacity

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Item, Part, Prompt, Template
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, AnswererDownError, ShownFingerprints, Usage
from lever_train.rollout.answerers.openai_key import KEY_VARIABLE, ApiKey
from lever_train.rollout.answerers.openai_reply import (
    Completion,
    PassingError,
    RefusedError,
    completion,
    post,
    retry_after,
)

_PASSING = {408, 425, 429}
_REFUSED = {400, 413, 422}
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_BATCHES = 8  # prompts handed over per slot: a slow one does not leave the others idle
_SECOND_CHANCES = 2
_NO_COMPLETION_TRIES = 3  # a body that is no completion may be a proxy's page; not forever
_SHOWN = 200  # characters of what an endpoint says


@dataclass
class OpenAIAnswerer:
    """A chat endpoint. Make one with :meth:`connect`."""

    base_url: str
    model: str
    spec: AnswererSpec
    template: Template = field(default_factory=Template)
    usage: Usage = field(default_factory=Usage)
    _key: ApiKey = field(default_factory=ApiKey)
    _shown: ShownFingerprints = field(default_factory=ShownFingerprints)

    @classmethod
    def connect(cls, url: str, spec: AnswererSpec) -> OpenAIAnswerer:
        """An answerer for the endpoint at ``url`` (``…/v1``); nothing is sent yet.

        Raises:
            UsageError: no model is named, the URL is none or holds a password, or no header can
                carry the key.
        """
        if spec.model is None:
            raise UsageError("the endpoint needs the name of a model", hint="--model NAME")
        if _parsed(url).userinfo:
            raise UsageError(
                "the endpoint's URL must not hold credentials", hint=f"export {KEY_VARIABLE}=…"
            )
        return cls(url.rstrip("/"), spec.model, spec, _key=ApiKey.read())

    @property
    def name(self) -> str:
        """The model's name; where it is served does not matter."""
        return self.model

    @property
    def batch_size(self) -> int:
        """Enough to keep every slot busy."""
        return self.spec.batch_size or self.spec.concurrency * _BATCHES

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters of the request."""
        return {
            "api": "chat",
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
            "template": self.template.sha256()[:16],
        }

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
        async with httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | self._key.headers(),
            timeout=None,  # each request has one for all of it
            limits=httpx.Limits(max_connections=self.spec.concurrency),
        ) as client:
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
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}]}
        try:
            await self._post(client, body | {"max_tokens": 1})
        except (PassingError, RefusedError) as error:
            cause = LeverError(
                f"the endpoint does not answer ({error})",
                where=self.base_url,
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
                body = self._body(prompt)
                async for attempt in self._attempts():
                    with attempt:
                        return await self._post(client, body)
            except RefusedError as error:
                return Answer(None, error=str(error))
            except PassingError as error:
                return error
            except OSError as error:
                return Answer(None, error=f"an image cannot be read: {error}")
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

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        """Ask once. No error of this repeats the key, nor has a cause that might."""
        url = f"{self.base_url}/chat/completions"
        try:
            reply = await post(client, url, body, self.spec.timeout)
            status = reply.status
            if status in _PASSING or status >= 500:
                raise PassingError(f"HTTP {status}", retry_after(reply))
            if status == httpx.codes.OK:
                return self._answer(completion(reply))
        except PassingError as error:
            raise PassingError(self._quoted(str(error)), error.wait, error.body) from None
        said = self._quoted(reply.shown())
        if status in _REFUSED:
            raise RefusedError(f"HTTP {status}: {said}")
        raise LeverError(
            f"the endpoint rejects the request: HTTP {status}",
            where=self.base_url,
            value=said,
            hint=f"check the URL, --model, and the key in {KEY_VARIABLE}",
        )

    def _answer(self, found: Completion) -> Answer:
        self.usage.answers += 1
        self.usage.prompt_tokens += found.prompt_tokens
        self.usage.completion_tokens += found.completion_tokens
        if found.text is None:
            return Answer(None, error="the completion has no text")
        return Answer(self._key.out_of_answer(found.text))

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        content = [self._content(part) for part in self.template.parts(prompt)]
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.template.system},
                {"role": "user", "content": content},
            ],
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
        }

    def _content(self, part: Part) -> dict[str, Any]:
        if part.image is None:
            return {"type": "text", "text": part.text}
        return {"type": "image_url", "image_url": {"url": _data_url(part.image)}}

    def _quoted(self, text: str) -> str:
        """The beginning of what the endpoint says; cut last, so that half a key is none."""
        return self._key.out_of(text)[:_SHOWN]


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        known = bool(parsed.host)
    except (httpx.InvalidURL, ValueError):  # the latter: a host that is no domain name
        known = False
    if not known:  # the URL is not shown: it may hold a password
        raise UsageError("this is no URL of an endpoint", hint="openai:http://127.0.0.1:8000/v1")
    return parsed


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
