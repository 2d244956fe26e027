"""Replies of an endpoint that are odd and can be used all the same."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest

from tests.endpoint import Endpoint, answerer, prompts, serving, texts


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ("null", (0, 0)),
        ("[1]", (0, 0)),
        ('"many"', (0, 0)),
        ('{"prompt_tokens": "many", "completion_tokens": 7}', (0, 7)),
        ('{"prompt_tokens": 1e999, "completion_tokens": -3}', (0, 0)),
        ('{"prompt_tokens": true, "completion_tokens": 2.0}', (0, 0)),
        (f'{{"prompt_tokens": {"9" * 4000}, "completion_tokens": 1}}', (0, 1)),
    ],
)
def test_what_is_no_count_of_tokens_is_not_counted(
    endpoint: Endpoint, usage: str, counted: tuple[int, int]
) -> None:
    reply = f'{{"choices": [{{"message": {{"content": "cat"}}}}], "usage": {usage}}}'
    endpoint.fault = lambda handler, question, attempt: handler.send(200, reply)
    one = answerer(endpoint)
    assert texts(one.answer(prompts(1))) == ["cat"]
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == counted


def test_half_characters_are_replaced(endpoint: Endpoint) -> None:
    reply = '{"choices": [{"message": {"content": "\\ud800 cat \\ud83d\\ude3a \\udfff"}}]}'
    endpoint.fault = lambda handler, question, attempt: handler.send(200, reply)
    (text,) = texts(answerer(endpoint).answer(prompts(1)))
    assert text == "\ufffd cat \U0001f63a \ufffd"


def test_a_compressed_reply_is_read(endpoint: Endpoint) -> None:
    reply = gzip.compress(b'{"choices": [{"message": {"content": "cat"}}]}')
    endpoint.fault = lambda handler, question, attempt: handler.send(
        200, reply, Content_Encoding="gzip"
    )
    assert texts(answerer(endpoint).answer(prompts(1))) == ["cat"]
