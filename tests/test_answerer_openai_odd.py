"""Replies of an endpoint that are odd: used all the same, or no answers and why."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lever_data.errors import LeverError
from lever_train.rollout.answerers.openai_reply import Reply, retry_after
from tests.endpoint import Endpoint, Handler, answerer, prompts, serving, texts


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


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"text": "", "ended": "content_filter"}, "content filter stopped the answer"),
        ({"text": "I", "ended": "content_filter"}, "content filter stopped the answer"),
        ({"text": "", "refusal": "I can't help."}, "the model refused: I can't help."),
        ({"text": " \n", "ended": "length"}, "the answer is empty before the token limit"),
        (
            {"text": "", "ended": "length", "reasoning_content": "Okay, let me"},
            "the model reasoned and gave no answer before the token limit (--max-new-tokens)",
        ),
        ({"text": None, "reasoning_content": "so red"}, "the model reasoned and gave no answer"),
        ({"text": None, "reasoning": "so red"}, "the model reasoned and gave no answer"),
        ({"text": "<think>\nOkay, so", "ended": "length"}, "reasoned and gave no answer before"),
        ({"text": None, "ended": "tool_calls"}, "the completion has no text"),
    ],
)
def test_what_is_no_answer_fails_with_its_reason(
    endpoint: Endpoint, reply: dict[str, Any], reason: str
) -> None:
    """It would be a reward of 0 that says nothing about the demonstrations; failures are neither
    scored nor cached."""
    endpoint.fault = lambda handler, question, attempt: handler.answer(**reply)
    (failed,) = answerer(endpoint).answer(prompts(1))
    assert failed.text is None and failed.error is not None and reason in failed.error


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"text": "<think>\nIt is red.\n</think>\n\nred"}, "red"),
        ({"text": "It is red.\n</think>\n\nred"}, "red"),  # the template opened it
        ({"text": "red", "reasoning_content": "It is blue."}, "red"),
        ({"text": "red hat with a", "ended": "length"}, "red hat with a"),
        ({"text": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]}, "red"),
        ({"text": ""}, ""),  # the model chose to say nothing
    ],
)
def test_the_answer_is_what_follows_the_reasoning(
    endpoint: Endpoint, reply: dict[str, Any], expected: str
) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.answer(**reply)
    one = answerer(endpoint)
    assert texts(one.answer(prompts(1))) == [expected]
    assert one.usage.cut == (reply.get("ended") == "length")


def refusal(message: str, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "code": code}})


@pytest.mark.slow
def test_a_server_that_wants_other_parameters_is_understood_once(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        body = endpoint.seen[-1]
        if "max_tokens" in body:
            told = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            return handler.send(400, refusal(told + "'max_completion_tokens' instead."))
        if "temperature" in body:
            told = "Unsupported value: 'temperature' does not support 0 with this model."
            return handler.send(400, refusal(told))
        return False

    endpoint.fault = fault
    one = answerer(endpoint, concurrency=1)
    with caplog.at_level(logging.WARNING, "lever.openai"):
        assert texts(one.answer(prompts(5))) == [f"echo {n}\n" for n in range(5)]
    assert len(endpoint.seen) == 5 + 2
    assert endpoint.seen[-1]["max_completion_tokens"] == 5
    assert caplog.text.count("takes no temperature") == 1
    assert one.provenance() == {
        "server": endpoint.url,
        "model": "m",
        "reported_model": "m-2026",
        "not_taken": ["max_tokens", "temperature"],
    }


def test_a_refusal_that_repeats_the_prompt_teaches_nothing(endpoint: Endpoint) -> None:
    told = "Prompt too long: what is the temperature of max_tokens 5"
    endpoint.fault = lambda handler, question, attempt: handler.send(400, refusal(told))
    (failed,) = answerer(endpoint).answer(prompts(1))
    assert failed.error == f"HTTP 400: {told}" and len(endpoint.seen) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, refusal("You exceeded your current quota, please check.", "insufficient_quota")),
        (402, "pay"),
    ],
)
def test_a_quota_that_is_used_up_stops_at_once(endpoint: Endpoint, status: int, body: str) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(status, body)
    with pytest.raises(LeverError, match="quota of the key in OPENAI_API_KEY is used up"):
        answerer(endpoint, concurrency=1).answer(prompts(4))
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("after", ["0", "0.0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_wait_that_is_none_is_not_taken_for_one(after: str) -> None:
    """A server that sends it is asked again at our own pace: 321 requests in 5 s else."""
    reply = Reply(429, httpx.Headers({"Retry-After": after}), b"")
    assert retry_after(reply) is None


@pytest.mark.slow
def test_an_error_sent_as_success_is_tried_again(endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: (
        attempt == 1 and handler.send(200, refusal("Rate limit exceeded"))
    )
    assert texts(answerer(endpoint).answer(prompts(1))) == ["echo 0\n"]
