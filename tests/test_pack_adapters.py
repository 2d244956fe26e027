"""The adapters of a packed selector, with the real packages where they are installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lever_train.options.train import ModelConfig
from lever_train.pack.packed import PackedSelector
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.kinds import make_selector

WHY = "the extra `adapters` is not installed: pip install 'lever[adapters]'"
TEXTS = {
    f"question {i}": torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(9)
}


def embed(text: str) -> Any:
    return TEXTS[text].numpy()


@pytest.fixture
def selector() -> PackedSelector:
    torch.manual_seed(0)
    model = make_selector(8, ModelConfig(hidden=8, num_heads=2)).eval().double()
    examples = pa.table(
        {
            "example_id": np.arange(8),
            "question": [f"question {i}" for i in range(8)],
            "answer": [f"answer {i}" for i in range(8)],
        }
    )
    vectors = torch.stack([TEXTS[f"question {i}"] for i in range(8)])
    return PackedSelector(SelectorPolicy("s", model), examples, vectors, pool_size=5)


@pytest.mark.skipif(find_spec("langchain_core") is None, reason=WHY)
def test_langchain_shows_the_picks(selector: PackedSelector) -> None:
    from langchain_core.prompts import FewShotPromptTemplate, PromptTemplate

    from lever_train.pack.langchain import LeverExampleSelector

    chooser = LeverExampleSelector(selector, k=2, embed=embed)
    prompt = FewShotPromptTemplate(
        example_selector=chooser,
        example_prompt=PromptTemplate.from_template("{question} {answer}"),
        suffix="{question}",
        input_variables=["question"],
    )
    picks = selector.select(embed("question 3"), 2)
    shown = [f"{p.example['question']} {p.example['answer']}" for p in picks]
    assert prompt.format(question="question 3").split("\n\n") == [*shown, "question 3"]
    assert chooser.add_example({"question": "question 8", "answer": "new"}) == 8
    everything = LeverExampleSelector(chooser.selector, k=5, embed=embed)
    found = everything.select_examples({"question": "question 8"})
    assert "new" in [example["answer"] for example in found]


@pytest.mark.skipif(find_spec("dspy") is None, reason=WHY)
def test_dspy_shows_the_picks(selector: PackedSelector) -> None:
    import dspy
    from dspy.utils import DummyLM

    from lever_train.pack.dspy import LeverFewShot

    program = LeverFewShot(selector, k=2, embed=embed).compile(dspy.Predict("question -> answer"))
    model = DummyLM([{"answer": "a"}, {"answer": "b"}])
    with dspy.context(lm=model):
        assert program(question="question 3").answer == "a"
        asked = str(model.history[-1]["messages"])
        picks = selector.select(embed("question 3"), 2)
        places = [asked.index(pick.example["answer"]) for pick in picks]
        assert places == sorted(places)
        left = [f"answer {i}" for i in range(8) if i not in {pick.id for pick in picks}]
        assert not any(answer in asked for answer in left)
        program(question="question 5")
    again = str(model.history[-1]["messages"])
    assert all(pick.example["answer"] in again for pick in selector.select(embed("question 5"), 2))
