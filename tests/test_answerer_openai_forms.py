"""What an endpoint is asked: chat in three forms, completions, log-probabilities; and by which name
its answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Item, Prompt
from lever_train.options.rollout import AnswererSpec
from tests.endpoint import Endpoint, Handler, answerer, serving, texts


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


def prompt(*, image: Path | None = None, given: tuple[str, ...] = ()) -> Prompt:
    items = [Item("d", "s", n, f"what is {n}", ("a",), f"a{n}", image) for n in range(3)]
    return Prompt(items[2], (items[0], items[1]), given)


def asked(endpoint: Endpoint, **changes: Any) -> dict[str, Any]:
    assert texts(answerer(endpoint, **changes).answer([prompt()])) == ["echo 2\n"]
    return endpoint.seen[-1]


def test_a_message_without_images_is_plain_text(endpoint: Endpoint) -> None:
    """Many servers drop lists of parts, and answer something all the same."""
    _, user = asked(endpoint)["messages"]
    glued = "Question:what is 0 Short answer:a0Question:what is 1 Short answer:a1"
    assert user["content"] == glued + "Question:what is 2 Short answer:"
    _, user = asked(endpoint, prompt_form="lines")["messages"]
    assert user["content"].splitlines() == [
        "Question:what is 0 Short answer:a0",
        "Question:what is 1 Short answer:a1",
        "Question:what is 2 Short answer:",
    ]


def test_turns_are_a_conversation(endpoint: Endpoint, tmp_path: Path) -> None:
    image = tmp_path / "i.png"
    Image.new("RGB", (4, 3)).save(image)
    body = asked(endpoint, prompt_form="turns")
    assert [m["role"] for m in body["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert [m["content"] for m in body["messages"][1:3]] == [
        "Question:what is 0 Short answer:",
        "a0",
    ]
    answerer(endpoint, prompt_form="turns").answer([prompt(image=image)])
    kinds = [[p["type"] for p in m["content"]] for m in endpoint.seen[-1]["messages"][1::2]]
    assert kinds == [["image_url", "text"]] * 3


def test_the_system_prompt_and_stop_words_are_the_users(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Answer briefly.\n")
    body = asked(endpoint, system_prompt=file, stop=("Question", "\n"))
    assert body["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert body["stop"] == ["Question", "\n"]
    file.write_text("")
    assert asked(endpoint, system_prompt=file)["messages"][0]["role"] == "user"
    with pytest.raises(UsageError, match="the system prompt cannot be read"):
        answerer(endpoint, system_prompt=tmp_path / "none")


def test_a_base_model_is_given_a_text_to_go_on_with(endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(
        200, json.dumps({"choices": [{"text": "red\nQuestion:", "finish_reason": "length"}]})
    )
    one = answerer(endpoint, api="completions")
    assert texts(one.answer([prompt()])) == ["red\nQuestion:"]
    (body,) = endpoint.seen
    assert "messages" not in body
    assert body["prompt"] == (
        "Question:what is 0 Short answer:a0\nQuestion:what is 1 Short answer:a1\n"
        "Question:what is 2 Short answer:"
    )
    endpoint.fault = lambda handler, question, attempt: handler.send(404, "Not Found")
    with pytest.raises(LeverError, match="HTTP 404") as none:
        answerer(endpoint, api="completions").answer([prompt()])
    assert "it may have no /completions: --api chat" in str(none.value.hint)
    with pytest.raises(UsageError, match="completions take a text, not turns"):
        AnswererSpec(api="completions", prompt_form="turns")


def test_answers_to_other_words_have_another_scorer(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Answer briefly.")
    forms: list[dict[str, Any]] = [
        {},
        {"prompt_form": "turns"},
        {"system_prompt": file},
        {"api": "completions"},
    ]
    names = [answerer(endpoint, **more).name for more in forms]
    assert len(set(names)) == 4 and all(name.startswith("m#") for name in names)
    assert answerer(endpoint, scorer="mine", prompt_form="turns").name == "mine"
    scopes = [answerer(endpoint, scorer="mine", **more).generation() for more in forms]
    assert all(a != b for a, b in pairwise(scopes))
    file.write_text("Answer at length.")
    assert answerer(endpoint, system_prompt=file).name not in names


def test_probabilities_are_those_of_the_answers_tokens(endpoint: Endpoint) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        body = endpoint.seen[-1]
        if "echo" in body:
            return handler.echo(body["prompt"])
        return handler.send(200, json.dumps({"choices": [{"text": "red"}]}))

    endpoint.fault = fault
    given = ("red", "a dog")
    one = answerer(endpoint, api="completions", log_probs=True, concurrency=1)
    (found,) = one.answer([prompt(given=given)])
    text = endpoint.seen[0]["prompt"]
    expected = []
    for answer in given:
        stop = len(text + answer + "\n")
        held = [s for s in range(0, stop, 2) if s + 2 > len(text)]
        expected.append(sum(-0.01 * s for s in held))
    assert found.text == "red" and found.log_probs == pytest.approx(expected)
    assert [b["prompt"] for b in endpoint.seen[1:]] == [f"{text}{a}\n" for a in given]
    assert one.usage.answers == 1


def test_probabilities_of_the_token_before_are_refused(endpoint: Endpoint) -> None:
    """llama-cpp-python, of a model without a first token: each token has the row of the next, and
    what it wrote itself has none left."""

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        body = endpoint.seen[-1]
        if "echo" not in body:
            return handler.send(200, json.dumps({"choices": [{"text": "red"}]}))
        starts = list(range(0, len(body["prompt"]), 2))
        logprobs = {"text_offset": starts, "token_logprobs": [-1.0] * len(starts)}
        choice = {"text": body["prompt"] + "!", "logprobs": logprobs}
        return handler.send(200, json.dumps({"choices": [choice]}))

    endpoint.fault = fault
    one = answerer(endpoint, api="completions", log_probs=True, concurrency=1)
    with pytest.raises(LeverError, match="one token too early"):
        one.answer([prompt(given=("red",))])


def test_a_chat_with_prompt_logprobs_gives_the_answer_and_the_end_of_its_turn(
    endpoint: Endpoint,
) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        body = endpoint.seen[-1]
        if "prompt_logprobs" not in body:
            return False  # 100 tokens of prompt, as the endpoint says
        assert body["add_generation_prompt"] is False and body["messages"][-1]["content"] == "a dog"
        return handler.prompt_logprobs("a dog")

    endpoint.fault = fault
    (found,) = answerer(endpoint, log_probs=True).answer([prompt(given=("a dog",))])
    assert found.text == "echo 2\n" and found.log_probs == pytest.approx((-0.01 - 0.03 - 0.25,))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_endpoint_without_probabilities_stops_at_once(endpoint: Endpoint, api: str) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(
        200, json.dumps({"choices": [{"message": {"content": "red"}}]})
    )
    one = answerer(endpoint, api=api, log_probs=True, concurrency=1)
    with pytest.raises(LeverError, match="gives no log-probabilities of a prompt") as error:
        one.answer([prompt(given=("red",))] * 5)
    assert "--no-gt-prob" in str(error.value.hint) and len(endpoint.seen) <= 3
