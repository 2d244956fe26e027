"""Causal language models through transformers: the words of a prompt, batches, probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lever_data.errors import UsageError
from lever_data.items.prompts import Item, Prompt
from lever_data.items.task import Task
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.causal_language import CausalModel
from lever_train.rollout.answerers.transformers import TransformersAnswerer
from tests.cases import long
from tests.tiny_lm import save_tiny_lm

QA = Task(name="qa")
ITEMS = [Item("d", "s", n, f"what is {'number ' * n}{n}", ("red",), "red") for n in range(9)]
PROMPTS = [Prompt(item, tuple(ITEMS[:k]), ("red", "a dog")) for k, item in enumerate(ITEMS)][:8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("llama") / "Tiny-LM")


def answerer(folder: Path, **more: Any) -> TransformersAnswerer:
    spec = AnswererSpec(max_new_tokens=6, **more)
    return TransformersAnswerer.load(str(folder), spec, QA)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("beams", [long(1), 3])
def test_answers_do_not_depend_on_the_batch(folder: Path, api: str, beams: int) -> None:
    found = [
        answerer(folder, api=api, num_beams=beams, batch_size=size).answer(PROMPTS)
        for size in (1, 8)
    ]
    assert [a.text for a in found[0]] == [a.text for a in found[1]]
    assert len({a.text for a in found[0]}) > 2  # they are answers to something
    for one, other in zip(*found, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_a_chat_is_asked_by_its_template_and_a_text_is_continued(folder: Path) -> None:
    shown = {}
    for api in ("chat", "completions"):
        one = answerer(folder, api=api)
        one.answer(PROMPTS[1:2])
        model = one._model
        assert isinstance(model, CausalModel)
        shown[api] = model.tokenizer.decode(model.encode(PROMPTS[1], one.template).ids)
    text = "Question: what is 0\nAnswer: red\n\nQuestion: what is number 1\nAnswer:"
    assert shown["completions"] == text
    assert shown["chat"] == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    names = {answerer(folder, api=api).name for api in ("chat", "completions")}
    assert len(names) == 2  # scores of the two are never mixed


def test_log_probabilities_are_those_of_one_pass_by_hand(folder: Path) -> None:
    one = answerer(folder, api="completions")
    (found,) = one.answer(PROMPTS[2:3])
    model = one._model
    assert isinstance(model, CausalModel) and found.log_probs is not None
    before = model.encode(PROMPTS[2], one.template).ids
    said = model.tokenizer(" red\n", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model.model(torch.tensor([before + said])).logits[0].log_softmax(-1)
    by_hand = sum(float(logits[len(before) - 1 + i, t]) for i, t in enumerate(said))
    assert math.isclose(found.log_probs[0], by_hand, abs_tol=1e-4)


def test_a_continued_text_ends_at_its_stop_word() -> None:
    model = CausalModel(None, None, "cpu", ("\n", "##"))
    assert model._ended("\n red\nQuestion", cut=True) == ("red", False)
    assert model._ended(" red ## more", cut=True) == ("red ", False)
    assert model._ended(" red", cut=True) == (" red", True)


def test_a_task_with_images_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="this model sees no images"):
        TransformersAnswerer.load(str(folder), AnswererSpec()).answer(PROMPTS[:1])
