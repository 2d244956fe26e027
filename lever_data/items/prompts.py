"""Prompts and post-processing: what a model is shown, and how its text becomes an answer.

In go a query and its demonstrations; out come the text and image items of one prompt in order, and
from the generated text the answer that is scored. The wording is that of the legacy system.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM_PROMPT = (
    "You answer questions about images. Follow the answer format of the demonstrations: "
    "reply with the short answer only, usually one word or a short phrase."
)
Id = int | str  # of a question or an image, as the official files give it
_CUT = re.compile(r"Question|Answer|Short")


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One dataset item, as a demonstration or as the query; compared by identity, as they are
    shared between the prompts that show them.

    ``example_id`` is its row in the split; ``image`` the file, where the model sees images;
    ``answers`` the annotators' answers; ``answer`` the one a demonstration shows; ``is_official``:
    the answers came from annotations, and not from RL data.
    """

    dataset: str
    split: str
    example_id: int
    question: str
    answers: tuple[str, ...]
    answer: str | None
    image: Path | None = None
    question_id: Id | None = None
    image_id: Id | None = None
    is_official: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A query after its ordered demonstrations; ``given`` are answers whose log-probabilities are
    wanted, distinct, where the answerer can give them."""

    query: Item
    demonstrations: tuple[Item, ...]
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A piece of a prompt: an image file or a text."""

    text: str | None = None
    image: Path | None = None


@dataclass(frozen=True)
class Template:
    """The words of a prompt; ``images`` off leaves a text-only prompt."""

    system: str = SYSTEM_PROMPT
    demonstration: str = "Question:{question} Short answer:{answer}"
    query: str = "Question:{question} Short answer:"
    images: bool = field(default=True)

    def parts(self, prompt: Prompt) -> list[Part]:
        """Image and text of every demonstration, then of the query."""
        found: list[Part] = []
        for item in (*prompt.demonstrations, prompt.query):
            if self.images and item.image is not None:
                found.append(Part(image=item.image))
            form = self.query if item is prompt.query else self.demonstration
            # replace, not format: questions may hold braces
            text = form.replace("{answer}", item.answer or "")
            found.append(Part(text=text.replace("{question}", item.question)))
        return found

    def sha256(self) -> str:
        """Hex sha256 of the words."""
        words = "\0".join([self.system, self.demonstration, self.query, str(self.images)])
        return hashlib.sha256(words.encode()).hexdigest()


def postprocess(generation: str) -> str:
    """The answer in a generated text: cut at the first of "Question", "Answer", "Short", then at
    ", ", and stripped."""
    text = _CUT.split(generation, maxsplit=1)[0]
    return text.split(", ", 1)[0].strip()
