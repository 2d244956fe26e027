"""One prompt asked of an endpoint: what the request says, and what its reply means.

In goes a prompt, out comes its answer or the reason why there is none: :class:`PassingError` where
asking again may help (refused or broken connections, timeouts, 408, 425, 429, 5xx, bodies that are
no completion), :class:`RefusedError` where this prompt is refused for good (400, 413, 422), and
:class:`LeverError` where no prompt will be answered. Nothing here waits or asks again.
"""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Part, Prompt, Template
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, Usage
from lever_train.rollout.answerers.openai_reply import (
    KEY_VARIABLE,
    ApiKey,
    Completion,
    PassingError,
    RefusedError,
    completion,
    post,
    retry_after,
)

_PASSING = {408, 425, 429}
_REFUSED = {400, 413, 422}
_SHOWN = 200  # characters of what an endpoint says


@dataclass
class Exchange:
    """An endpoint as one request sees it. Make one with :meth:`connect`."""

    base_url: str
    model: str
    spec: AnswererSpec
    template: Template = field(default_factory=Template)
    usage: Usage = field(default_factory=Usage)
    _key: ApiKey = field(default_factory=ApiKey)

    @classmethod
    def connect(cls, url: str, spec: AnswererSpec) -> Exchange:
        """For the endpoint at ``url`` (``…/v1``); nothing is sent yet.

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

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters of the request."""
        return {
            "api": "chat",
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
            "template": self.template.sha256()[:16],
        }

    def client(self) -> httpx.AsyncClient:
        """A connection pool for :meth:`ask`, for one event loop."""
        return httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | self._key.headers(),
            timeout=None,  # each request has one for all of it
            limits=httpx.Limits(max_connections=self.spec.concurrency),
        )

    async def ask(self, client: httpx.AsyncClient, prompt: Prompt) -> Answer:
        """Ask once.

        Raises:
            PassingError: it may pass; ``wait`` says how long the endpoint wants to be left alone.
            RefusedError: the endpoint will not answer this prompt.
            LeverError: it will answer none.
            OSError: an image cannot be read.
        """
        return self._answer(await self._post(client, self._body(prompt)))

    async def greet(self, client: httpx.AsyncClient) -> None:
        """Ask the smallest question there is; raises as :meth:`ask` does."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}]}
        self._answer(await self._post(client, body | {"max_tokens": 1}))

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Completion:
        """No error of this repeats the key, nor has a cause that might."""
        url = f"{self.base_url}/chat/completions"
        try:
            reply = await post(client, url, body, self.spec.timeout)
            status = reply.status
            if status in _PASSING or status >= 500:
                raise PassingError(f"HTTP {status}", retry_after(reply))
            if status == httpx.codes.OK:
                return completion(reply)
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
        content = [_content(part) for part in self.template.parts(prompt)]
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.template.system},
                {"role": "user", "content": content},
            ],
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
        }

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


def _content(part: Part) -> dict[str, Any]:
    if part.image is None:
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": _data_url(part.image)}}


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
