"""Prompts and post-processing: what a model is shown, and how its text becomes an answer.

In go a query and its demonstrations; out come the turns of one conversation, or one text, and from
the generated text the answer that is scored. Demonstrations and queries are worded as in the legacy
system; its system prompt is not ours and can be read from a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SYSTEM_PROMPT = (
    "You answer questions about images. Follow the answer format of the demonstrations: "
    "reply with the short answer only, usually one word or a short phrase."
)
Id = int | str  # of a question or an image, as the official files give it
FIELD = re.compile(r"\{(\w+)\}")  # of a template: what an item holds under this name
CUT_AT = ("Question", "Answer", "Short", ", ")  # where the legacy system ends an answer


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One dataset item, as a demonstration or as the query; compared by identity, as they are
    shared between the prompts that show them.

    ``example_id`` is its row in the split; ``image`` the file, where the model sees images;
    ``answers`` the annotators' answers; ``answer`` the one a demonstration shows; ``is_official``:
    the answers came from annotations, and not from RL data; ``fields``: what else a template may
    show, by name.
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
    fields: Mapping[str, str] = field(default_factory=dict)


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
class Turn:
    """What one side says: ``role`` is system, user or assistant."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its words, images left out."""
        return "".join(part.text or "" for part in self.parts)

    @property
    def shown(self) -> str:
        """Its words for people to read, images as the names of their files."""
        return "".join(p.text or "" if p.image is None else f"<{p.image}>" for p in self.parts)


@dataclass(frozen=True)
class Template:
    """The words of a prompt.

    ``form``: how demonstrations stand before the query. ``message``: glued together in one message,
    as in the legacy system; ``lines``: the same, each on a line of its own; ``turns``: as a
    conversation, every answer a reply. ``separator`` stands after each demonstration but in turns.
    ``images`` off leaves a text-only prompt.
    """

    system: str = SYSTEM_PROMPT
    demonstration: str = "Question:{question} Short answer:{answer}"
    query: str = "Question:{question} Short answer:"
    images: bool = True
    form: Literal["message", "lines", "turns"] = "message"
    separator: str = ""

    def turns(self, prompt: Prompt) -> list[Turn]:
        """The conversation that asks for an answer: the system's words, where there are any, then
        the user's, which end with the query."""
        found = [Turn("system", (Part(self.system),))] if self.system else []
        if self.form == "turns":
            for item in prompt.demonstrations:
                found.append(Turn("user", (*self._image(item), Part(_worded(self.query, item)))))
                found.append(Turn("assistant", (Part(item.answer or ""),)))
        said: list[Part] = []
        for item in prompt.demonstrations if self.form != "turns" else ():
            text = _worded(self.demonstration, item) + self._between
            said += [*self._image(item), Part(text)]
        said += [*self._image(prompt.query), Part(_worded(self.query, prompt.query))]
        return [*found, Turn("user", tuple(said))]

    def text(self, prompt: Prompt) -> str:
        """The prompt as one text for a model to go on with, images left out."""
        *before, asked = self.turns(prompt)
        return "".join(f"{turn.text}\n\n" for turn in before) + asked.text

    def shown(self, prompt: Prompt) -> str:
        """The conversation for people to read: who says what, images as the names of files."""
        return "\n".join(f"[{turn.role}] {turn.shown}" for turn in self.turns(prompt))

    def sha256(self) -> str:
        """Hex sha256 of the words."""
        words = [self.system, self.demonstration, self.query, str(self.images)]
        if self.form != "message":
            words.append(self.form)
        if self.separator:
            words.append(self.separator)
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    @property
    def _between(self) -> str:
        return self.separator or ("\n" if self.form == "lines" else "")

    def _image(self, item: Item) -> list[Part]:
        return [Part(image=item.image)] if self.images and item.image is not None else []


def _worded(form: str, item: Item) -> str:
    """The template with what the item holds; other braces stay, as in a question's own."""
    said = {"question": item.question, "input": item.question, "answer": item.answer or ""}
    known = {**item.fields, **said}
    return FIELD.sub(lambda match: known.get(match[1], match[0]), form)
