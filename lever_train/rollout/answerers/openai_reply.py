"""One HTTP request to an endpoint and what came back, whatever the endpoint makes of the protocol.

In goes a request; out comes a :class:`Reply` of bounded size within a bounded time, and from it a
:class:`Completion`. Whatever is not as it should be is a :class:`PassingError`. The key is read
from ``OPENAI_API_KEY``, sent in a header, and shown to nobody.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import httpx

from lever_data.errors import UsageError

KEY_VARIABLE = "OPENAI_API_KEY"
# Servers that want no key are given a word such as "none" or "EMPTY"; those are not secrets, and
# may well be what a model answers
_SHORTEST_SECRET = 8
MAX_BYTES = 4 << 20  # of a reply; a completion of 128k tokens has less than 1 MiB
_MAX_TOKENS = 1 << 40  # what claims more is not counted
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ApiKey:
    """A key that a header can carry, or none (``""``). Make one with :meth:`read`."""

    value: str = field(default="", repr=False)

    @classmethod
    def read(cls) -> ApiKey:
        """The key of the environment, without the whitespace around it (a file's newline).

        Raises:
            UsageError: no header can carry it; the message does not show it.
        """
        given = os.environ.get(KEY_VARIABLE, "")
        value = given.strip()
        if given and not value:
            raise UsageError(
                f"{KEY_VARIABLE} holds only whitespace",
                hint=f"unset {KEY_VARIABLE} where the endpoint wants no key",
            )
        if not all("!" <= c <= "~" for c in value):
            raise UsageError(
                f"{KEY_VARIABLE} holds whitespace or characters beyond ASCII, which no key has",
                hint=f"export {KEY_VARIABLE}=… again, with nothing but the key",
            )
        return cls(value)

    def headers(self) -> dict[str, str]:
        """What proves the key to the endpoint."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}

    def out_of(self, message: str) -> str:
        """A message without the key, which an endpoint or a library may repeat in it."""
        for form in self._forms():
            message = message.replace(form, "***")
        return message

    def out_of_answer(self, text: str) -> str:
        """A model's answer without the key, unless that is too short to be a secret."""
        return self.out_of(text) if len(self.value) >= _SHORTEST_SECRET else text

    def _forms(self) -> list[str]:
        """The ways a text may spell the key, longest first: as it is, quoted, in JSON, in a URL."""
        if not self.value:
            return []
        in_json = json.dumps(self.value)[1:-1]
        forms = {self.value, repr(self.value)[1:-1], in_json, in_json.replace("/", "\\/")}
        return sorted(forms | {quote(self.value, safe="")}, key=len, reverse=True)


class PassingError(Exception):
    """A failure that may pass; ``wait`` seconds as the endpoint asked, if it did. ``body``: the
    endpoint did reply, with something that is not a completion."""

    def __init__(self, reason: str, wait: float | None = None, body: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.body = body


class RefusedError(Exception):
    """The endpoint will not answer this prompt."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Status, headers, and the bytes as they came: at most :data:`MAX_BYTES`, ``cut`` if more."""

    status: int
    headers: httpx.Headers
    body: bytes
    cut: bool = False

    def shown(self) -> str:
        """The body as text, however broken."""
        try:
            return _decoded(self).decode(errors="replace")
        except PassingError:
            return ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a completion says. ``refusal``: why there is no answer in it, where there is none.
    ``cut``: it ended at the token limit. ``model``: what the endpoint calls its model. ``content``:
    the whole reply, for what only some servers send."""

    text: str
    refusal: str | None
    cut: bool
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    content: dict[str, Any]


async def post(client: httpx.AsyncClient, url: str, body: dict[str, Any], timeout: float) -> Reply:
    """Send a request. ``timeout`` (seconds) bounds all of it: httpx's own bounds the wait for the
    next bytes, so that one byte a second would last for ever.

    Raises:
        PassingError: no reply. Its message, like all of this module, repeats what the endpoint and
            the library say and so perhaps the key: whoever shows it cleans it.
    """
    try:
        async with asyncio.timeout(timeout), client.stream("POST", url, json=body) as response:
            found = bytearray()
            async for chunk in response.aiter_raw():
                found += chunk
                if len(found) > MAX_BYTES:
                    break
            cut = len(found) > MAX_BYTES
            return Reply(response.status_code, response.headers, bytes(found[:MAX_BYTES]), cut)
    except TimeoutError:
        raise PassingError(f"no whole reply within {timeout:g} s") from None
    except httpx.RequestError as error:
        raise PassingError(f"{type(error).__name__}: {error}") from None


def completion(reply: Reply) -> Completion:
    """What a reply with status 200 says, of chat or plain completions. Half characters (lone
    surrogates, which JSON can spell and UTF-8 cannot) become U+FFFD.

    Raises:
        PassingError: it is not a completion, or an error sent as if all were well.
    """
    try:
        content = json.loads(_decoded(reply))
        choice = content["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        said, ended = message["content"], choice.get("finish_reason")
        if isinstance(said, list):  # parts, of which those of type text hold the answer
            said = "".join(part["text"] for part in said if part["type"] == "text")
    # a RecursionError: brackets without end
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        if (told := error_of(reply)) is not None:
            raise PassingError(f"the reply is an error: {told}") from None
        kind = reply.headers.get("content-type", "unknown type")
        raise PassingError(f"the body is not a completion ({kind})", body=True) from error
    usage, model = content.get("usage"), content.get("model")
    return Completion(
        _HALF_CHARACTERS.sub("\ufffd", said) if isinstance(said, str) else "",
        _refusal(message, said, ended),
        ended == "length",
        model if isinstance(model, str) else None,
        _tokens(usage, "prompt_tokens"),
        _tokens(usage, "completion_tokens"),
        content,
    )


def _refusal(message: dict[str, Any], said: object, ended: object) -> str | None:
    """Why a message is no answer, whatever text it has."""
    if refusal := message.get("refusal"):
        return f"the model refused: {refusal}"
    if ended == "content_filter":
        return "the endpoint's content filter stopped the answer"
    reasoned = message.get("reasoning_content") or message.get("reasoning")
    if reasoned and (not isinstance(said, str) or not said.strip()):
        at_limit = " before the token limit (--max-new-tokens)" if ended == "length" else ""
        return f"the model reasoned and gave no answer{at_limit}"
    return None if isinstance(said, str) else "the completion has no text"


def text_log_prob(content: dict[str, Any], start: int, stop: int) -> float:
    """Log-probability (nats) of the characters ``start`` to ``stop`` of an echoed text: the sum
    over the tokens that hold any of them (``logprobs`` of ``/v1/completions``).

    Raises:
        LookupError, TypeError, ValueError: the reply has none, or those of other tokens.
    """
    logprobs = content["choices"][0]["logprobs"]
    starts, values = logprobs["text_offset"], logprobs["token_logprobs"]
    written = len(content["choices"][0]["text"])
    # llama-cpp-python gives every token of a model without a first token the row of the next one,
    # and so has none left for what it wrote itself
    if written > stop and max(starts) < stop:
        raise ValueError("its probabilities stand one token too early")
    ends = [*starts[1:], written]
    inside = [
        value
        for first, last, value in zip(starts, ends, values, strict=True)
        if first < stop and last > start
    ]
    if not inside:
        raise ValueError("the reply does not repeat the prompt")
    return math.fsum(inside)


def turn_log_prob(content: dict[str, Any], before: int, answer: str) -> float:
    """Log-probability (nats) of an answer and the token that ends its turn, which stand after
    ``before`` tokens (``prompt_logprobs`` of vLLM, the prompt's own token first in each).

    Raises:
        LookupError, TypeError, ValueError: the reply has none.
    """
    spoken, values = "", []
    for entry in content["prompt_logprobs"][before:]:
        token = next(iter(entry.values()))
        values.append(token["logprob"])
        if len(spoken) >= len(answer):
            return math.fsum(values)
        spoken += token["decoded_token"]
    raise ValueError("the turn has no end")


def error_of(reply: Reply) -> str | None:
    """What the endpoint says went wrong, and the code it gives it: ``error.message`` of a JSON
    body, as OpenAI writes it; ``None`` where there is no such thing."""
    try:
        found = json.loads(reply.shown())["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(found, dict):
        return found if isinstance(found, str) else None
    code = found.get("code")
    named = f"{code}: " if isinstance(code, str) else ""
    return named + str(found.get("message", found))


def retry_after(reply: Reply) -> float | None:
    """Seconds the header asks to wait, a number or an HTTP date; ``None`` where it asks for none,
    as 0 and a date that is past do: a server that sends them is not asked again at once."""
    value = reply.headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdecimal():
        return float(value) or None
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter: a time zone beyond all days
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    left = (moment - datetime.now(UTC)).total_seconds()
    return left if left > 0 else None


def _decoded(reply: Reply) -> bytes:
    """The body without its gzip, which some servers use unasked; bounded as the bytes are, since a
    thousandth of the size can be sent for it."""
    body, cut = reply.body, reply.cut
    coding = reply.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("gzip", "x-gzip"):
        try:
            unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            body = unzip.decompress(body, MAX_BYTES)
            cut = cut or bool(unzip.unconsumed_tail)
        except zlib.error as error:
            raise PassingError(f"the body is not gzip ({error})", body=True) from None
    elif coding not in ("identity", ""):
        raise PassingError(f"the body is encoded ({coding})", body=True)
    if cut and reply.status == httpx.codes.OK:
        raise PassingError(f"the body is longer than {MAX_BYTES >> 20} MiB", body=True)
    return body


def _tokens(usage: object, name: str) -> int:
    """A count as the endpoint reports it; 0 where it is none."""
    found = usage.get(name) if isinstance(usage, dict) else None
    # not isinstance: true is not a count
    return found if type(found) is int and 0 <= found < _MAX_TOKENS else 0
