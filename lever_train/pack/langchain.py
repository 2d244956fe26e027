"""A packed selector as LangChain's example selector (extra ``adapters``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_core.example_selectors.base import BaseExampleSelector

from lever_train.pack.packed import PackedSelector


class LeverExampleSelector(BaseExampleSelector):  # type: ignore[misc]
    """Chooses ``k`` examples for a prompt; where it is ``None``, the selector stops by itself.

    ``embed`` makes the vector of a question; without it the pack's own encoder does. ``input_key``:
    the variable that holds the question.
    """

    def __init__(
        self,
        selector: PackedSelector,
        k: int | None = 2,
        embed: Callable[[str], Any] | None = None,
        input_key: str = "question",
    ) -> None:
        self.selector, self.k, self.embed, self.input_key = selector, k, embed, input_key

    def add_example(self, example: dict[str, Any]) -> int:
        """Add an example, under the next free id; returns the id."""
        number = max(self.selector.examples.column("example_id").to_pylist(), default=-1) + 1
        vectors = None if self.embed is None else [self.embed(example[self.input_key])]
        self.selector = self.selector.add_examples([{"example_id": number} | example], vectors)
        return number

    def select_examples(self, input_variables: dict[str, Any]) -> list[dict[str, Any]]:
        """The examples, in the order they are to be shown."""
        text = input_variables[self.input_key]
        picks = self.selector.select(text if self.embed is None else self.embed(text), self.k)
        return [pick.example for pick in picks]
