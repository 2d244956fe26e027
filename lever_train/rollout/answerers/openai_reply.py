"""One HTTP request to an endpoint and what came back, whatever the endpoint makes of the protocol.

In goes a request; out comes a :class:`Reply` of bounded size within a bounded time, and from it a
:class:`Completion`. Whatever is not as it should be is a :class:`PassingError`. The key is read
from ``OPENAI_API_KEY``, sent in a header, and shown to nobody.
"""

from __future__ import annotations

import asyncio
import json
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
# Servers that want no key are given a word such as "none" or "EMPTY"; those are no secrets, and
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
    endpoint did reply, with something that is no completion."""

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
    """A chat completion; ``text`` is ``None`` where it has none."""

    text: str | None
    prompt_tokens: int
    completion_tokens: int


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
    """What a reply with status 200 says. Half characters (lone surrogates, which JSON can spell and
    UTF-8 cannot) become U+FFFD.

    Raises:
        PassingError: it is no chat completion.
    """
    try:
        content = json.loads(_decoded(reply))
        text = content["choices"][0]["message"]["content"]
    # a RecursionError: brackets without end
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        kind = reply.headers.get("content-type", "unknown type")
        raise PassingError(f"the body is no chat completion ({kind})", body=True) from error
    text = _HALF_CHARACTERS.sub("\ufffd", text) if isinstance(text, str) else None
    usage = content.get("usage")
    return Completion(text, _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens"))


def retry_after(reply: Reply) -> float | None:
    """Seconds the header asks to wait: a number or an HTTP date."""
    value = reply.headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter: a time zone beyond all days
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


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
            raise PassingError(f"the body is no gzip ({error})", body=True) from None
    elif coding not in ("identity", ""):
        raise PassingError(f"the body is encoded ({coding})", body=True)
    if cut and reply.status == httpx.codes.OK:
        raise PassingError(f"the body is longer than {MAX_BYTES >> 20} MiB", body=True)
    return body


def _tokens(usage: object, name: str) -> int:
    """A count as the endpoint reports it; 0 where it is none."""
    found = usage.get(name) if isinstance(usage, dict) else None
    # not isinstance: true is no count
    return found if type(found) is int and 0 <= found < _MAX_TOKENS else 0
