"""One prompt asked of an endpoint: what the request says, and what its reply means.

In goes a prompt, out comes its answer or the reason why there is none: :class:`PassingError` where
asking again may help (refused or broken connections, timeouts, 408, 425, 429, 5xx, bodies that are
no completion), :class:`RefusedError` where this prompt is refused for good (400, 413, 422), and
:class:`LeverError` where no prompt will be answered. Nothing here waits or asks again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Part, Prompt, Template, Turn
from lever_data.items.task import Task
from lever_train.inputs.images import open_image, shown_bytes
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, Usage, answer_of, template_of
from lever_train.rollout.answerers.openai_reply import (
    KEY_VARIABLE,
    ApiKey,
    Completion,
    PassingError,
    RefusedError,
    Reply,
    completion,
    error_of,
    post,
    retry_after,
    text_log_prob,
    turn_log_prob,
)

_PASSING = {408, 425, 429}
_REFUSED = {400, 413, 422}
_SHOWN = 200  # characters of what an endpoint says
_IMAGES_KEPT = 256  # demonstrations come again and again; some 50 MB
_NO_QUOTA = re.compile(r"insufficient_quota|exceeded your current quota")
# What a server may refuse in a request that it would take without, and what stands in for it
_NEGOTIABLE = {"max_tokens": "max_completion_tokens", "temperature": None, "stop": None}
_UNWANTED = re.compile(r"not support|unsupported|unrecognized|unknown|unexpected|not permitted")
_LOG = logging.getLogger("lever.openai")


@dataclass
class Exchange:
    """An endpoint as one request sees it. Make one with :meth:`connect`.

    ``reported``: what the endpoint called its model in the last reply.
    """

    base_url: str
    model: str
    spec: AnswererSpec
    template: Template
    usage: Usage = field(default_factory=Usage)
    reported: str | None = None
    _key: ApiKey = field(default_factory=ApiKey)
    _unwanted: set[str] = field(default_factory=set)

    @classmethod
    def connect(cls, url: str, spec: AnswererSpec, task: Task | None = None) -> Exchange:
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
        template, model = template_of(spec, task), spec.model
        if spec.api == "completions" and task is not None and not spec.stop:
            spec = spec.but(stop=task.stop)  # a chat ends by itself
        return cls(url.rstrip("/"), model, spec, template, _key=ApiKey.read())

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters of the request."""
        found: dict[str, Any] = {
            "api": self.spec.api,
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
            "template": self.template.sha256()[:16],
            "model": self.model,
            "log_probs": bool(self.spec.log_probs),
        }
        return found | ({"stop": list(self.spec.stop)} if self.spec.stop else {})

    def provenance(self) -> dict[str, Any]:
        """Who answered, for the record of a run: no answer depends on it by intent."""
        return {
            "server": self.base_url,
            "model": self.model,
            "reported_model": self.reported,
            "not_taken": sorted(self._unwanted),
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
        if any(item.image is not None for item in (*prompt.demonstrations, prompt.query)):
            # in a thread: decoding the images of a prompt takes as long as many a reply
            shown = await asyncio.to_thread(self._shown, prompt)
        else:
            shown = self._shown(prompt)
        found = await self._post(client, shown | self._how)
        answer = answer_of(self._key.out_of_answer(found.text), cut=found.cut)
        if found.refusal is not None:
            answer = Answer(None, error=self._quoted(found.refusal))
        if not self.spec.generate:
            answer = Answer("")
        if answer.text is not None and self.spec.log_probs:
            before = found.prompt_tokens
            sums = [await self._log_prob(client, shown, a, before) for a in prompt.given]
            answer = replace(answer, log_probs=tuple(sums))
        self.usage.answers += 1
        self.usage.cut += found.cut
        return answer

    async def _log_prob(
        self, client: httpx.AsyncClient, shown: dict[str, Any], answer: str, before: int
    ) -> float:
        """Log-probability (nats) of an answer and its end after what is shown, which has ``before``
        tokens: of a text the end is its stop word, of a chat the token that ends a turn.

        Raises:
            LeverError: the endpoint does not give log-probabilities of a prompt.
        """
        try:
            if self.spec.api == "completions":
                text, end = shown["prompt"], (*self.spec.stop, "\n")[0]
                body = {"prompt": f"{text}{answer}{end}", "echo": True, "logprobs": 1}
                found = await self._post(client, body | {"max_tokens": 1, "temperature": 0})
                return text_log_prob(found.content, len(text), len(f"{text}{answer}{end}"))
            said = {"role": "assistant", "content": answer}
            body = {"messages": [*shown["messages"], said], "add_generation_prompt": False}
            asked = body | {"prompt_logprobs": 1, "max_tokens": 1, "temperature": 0}
            return turn_log_prob((await self._post(client, asked)).content, before, answer)
        except (RefusedError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise LeverError(
                "the endpoint gives no log-probabilities of a prompt",
                where=self.base_url,
                value=str(error),
                hint="--no-gt-prob goes without; vLLM gives them, and llama-cpp-python with "
                "--api completions for models that begin a text with a token of their own",
            ) from None

    async def greet(self, client: httpx.AsyncClient) -> None:
        """Ask the smallest question there is; raises as :meth:`ask` does."""
        asked = {"messages": [{"role": "user", "content": "Hi"}]}
        shown = asked if self.spec.api == "chat" else {"prompt": "Hi"}
        await self._post(client, shown | {"max_tokens": 1})

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Completion:
        """No error of this repeats the key, nor has a cause that might."""
        body = self._acceptable({"model": self.model} | body)
        try:
            reply = await post(client, self._url, body, self.spec.timeout)
            if self._learn(reply, body):
                return await self._post(client, body)
            self._require_answered(reply)
            found = completion(reply)
        except PassingError as error:
            raise PassingError(self._quoted(str(error)), error.wait, error.body) from None
        self.reported = found.model
        self.usage.prompt_tokens += found.prompt_tokens
        self.usage.completion_tokens += found.completion_tokens
        return found

    def _require_answered(self, reply: Reply) -> None:
        """Raise what a status other than 200 means."""
        status = reply.status
        if status == httpx.codes.OK:
            return
        said = self._quoted(error_of(reply) or reply.shown())
        if status == httpx.codes.PAYMENT_REQUIRED or _NO_QUOTA.search(said):
            raise LeverError(
                f"the quota of the key in {KEY_VARIABLE} is used up",
                where=self.base_url,
                value=said,
                hint="nothing is lost: run the same command again when there is some",
            )
        reason = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        if status in _PASSING or status >= 500:
            raise PassingError(reason, retry_after(reply))
        if status in _REFUSED:
            raise RefusedError(reason)
        asked = "; it may have no /completions: --api chat" if self.spec.api != "chat" else ""
        raise LeverError(
            f"the endpoint rejects the request: HTTP {status}",
            where=self.base_url,
            value=said,
            hint=f"check the URL, --model, and the key in {KEY_VARIABLE}{asked}",
        )

    def _acceptable(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request without what the server was found not to take."""
        named = {k: _NEGOTIABLE[k] if k in self._unwanted else k for k in body}
        return {name: body[k] for k, name in named.items() if name is not None}

    def _learn(self, reply: Reply, body: dict[str, Any]) -> bool:
        """Whether a refusal names a parameter that can be left out or go by another name; from
        then on every request does without it."""
        if reply.status != httpx.codes.BAD_REQUEST:
            return False
        said = error_of(reply) or reply.shown()
        found = {k for k in _NEGOTIABLE if k in body and re.search(rf"\b{k}\b", said)}
        if not found or not _UNWANTED.search(said.lower()):
            return False
        if "temperature" in found - self._unwanted:
            _LOG.warning(
                "%s takes no temperature: its answers are not greedy, and asked again it may "
                "answer otherwise",
                self.model,
            )
        self._unwanted |= found
        return True

    @property
    def _how(self) -> dict[str, Any]:
        limit = self.spec.max_new_tokens if self.spec.generate else 1
        how = {"max_tokens": limit, "temperature": 0}
        return how | ({"stop": list(self.spec.stop)} if self.spec.stop else {})

    def _shown(self, prompt: Prompt) -> dict[str, Any]:
        if self.spec.api == "completions":
            return {"prompt": self.template.text(prompt)}
        return {"messages": [_message(turn) for turn in self.template.turns(prompt)]}

    @property
    def _url(self) -> str:
        path = "chat/completions" if self.spec.api == "chat" else "completions"
        return f"{self.base_url}/{path}"

    def _quoted(self, text: str) -> str:
        """The beginning of what the endpoint says; cut last, so that half a key is none."""
        return self._key.out_of(text)[:_SHOWN]


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        known = bool(parsed.host)
    except (httpx.InvalidURL, ValueError):  # the latter: a host that is not a domain name
        known = False
    if not known:  # the URL is not shown: it may hold a password
        raise UsageError("this is no URL of an endpoint", hint="openai:http://127.0.0.1:8000/v1")
    return parsed


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as the endpoint reads it; without an image it is plain text, as many servers drop
    lists of parts or glue them in ways of their own."""
    if all(part.image is None for part in turn.parts):
        return {"role": turn.role, "content": turn.text}
    return {"role": turn.role, "content": [_content(part) for part in turn.parts]}


def _content(part: Part) -> dict[str, Any]:
    if part.image is None:
        return {"type": "text", "text": part.text}
    url = _data_url(part.image, part.image.stat().st_mtime_ns)
    return {"type": "image_url", "image_url": {"url": url}}


@lru_cache(_IMAGES_KEPT)
def _data_url(path: Path, changed: int) -> str:
    """Of the file as it was ``changed``: the time is a part of the key."""
    open_image(path)  # a damaged file is found here, not by whatever the server makes of it
    data, kind = shown_bytes(path)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
