"""A packed selector in DSPy: demonstrations chosen for every call (extra ``adapters``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from lever_train.pack.packed import PackedSelector


class LeverFewShot(Teleprompter):  # type: ignore[misc]
    """In place of ``KNNFewShot``: every call shows its predictors the ``k`` examples chosen for it.

    ``embed`` makes the vector of a question; without it the pack's own encoder does.
    """

    def __init__(
        self, selector: PackedSelector, k: int | None = 2, embed: Callable[[str], Any] | None = None
    ) -> None:
        self.selector, self.k, self.embed = selector, k, embed

    def demos(self, question: str) -> list[Any]:
        """The examples for a question, in the order they are to be shown."""
        picks = self.selector.select(self.embed(question) if self.embed else question, self.k)
        return [dspy.Example(**pick.example).with_inputs("question") for pick in picks]

    def compile(self, student: Any, **_: Any) -> Any:
        """A copy of ``student`` that asks with the chosen examples."""
        compiled, forward = student.deepcopy(), student.__class__.forward

        def ask(question: str, **more: Any) -> Any:
            for predictor in compiled.predictors():
                predictor.demos = self.demos(question)
            return forward(compiled, question=question, **more)

        compiled.forward = ask
        return compiled
