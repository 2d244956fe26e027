"""The interface of everything that answers prompts.

In go :class:`Prompt` records, out come as many :class:`Answer` records in the same order. A prompt
that could not be answered gets an answer with ``error``; only what makes all further work
pointless is raised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lever_data.errors import UsageError, reason
from lever_data.items.prompts import Item, Prompt, Template
from lever_data.items.task import Task
from lever_train.inputs.images import shown_bytes
from lever_train.options.rollout import AnswererSpec


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt.

    ``text`` is the raw generation, ``None`` where ``error`` says why there is none; ``log_probs``
    are those of the prompt's ``given`` answers in nats (-inf: impossible), ``None`` where the
    answerer has none.
    """

    text: str | None
    log_probs: tuple[float, ...] | None = None
    error: str | None = None


_THINKS, _THOUGHT = "<think>", "</think>"


def answer_of(generation: str, *, cut: bool) -> Answer:
    """The answer in what a model generated. Reasoning (all up to ``</think>``) is not part of it;
    reasoning without an end, or nothing before the token limit (``cut``), is no answer at all:
    it would score 0 and say nothing about the demonstrations."""
    limit = " before the token limit (--max-new-tokens)" if cut else ""
    _, thought, text = generation.rpartition(_THOUGHT)
    if thought:
        text = text.lstrip()
    elif generation.lstrip().startswith(_THINKS):
        return Answer(None, error=f"the model reasoned and gave no answer{limit}")
    if cut and not text.strip():
        return Answer(None, error=f"the answer is empty{limit}")
    return Answer(text)


def asked_task(task: Task, spec: AnswererSpec) -> Task:
    """The task as it is asked: what the answerer's options say goes before what the task says."""
    given = {"stop": spec.stop, "cut_at": spec.cut_at}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value}
    if task.images and not spec.images:
        changes["images"] = False
    if spec.api == "completions" and not (task.stop or spec.stop):
        # a base model goes on with the next question; servers take four words
        changes["stop"] = ("\n", *filter(None, task.but(**changes).cut_at))[:4]
    return task.but(**changes) if changes else task


def template_of(spec: AnswererSpec, task: Task | None = None) -> Template:
    """The words of the prompts an answerer is shown; of ``vqa`` where no task is given.

    Raises:
        UsageError: the file of the system prompt cannot be read.
    """
    is_chat, task = spec.api == "chat", task or Task()
    system = task.system if is_chat else ""
    if spec.system_prompt is not None:
        try:
            system = spec.system_prompt.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the system prompt cannot be read ({reason(error)})", where=str(spec.system_prompt)
            ) from None
    form = spec.prompt_form or ("message" if is_chat else "lines")
    return Template(
        system=system,
        demonstration=task.demonstration,
        query=task.query,
        images=is_chat and task.images and spec.images,
        form=form,
        separator=task.separator,
    )


def scorer_name(model: str, spec: AnswererSpec, template: Template) -> str:
    """What rows are marked with: answers to other words are another scorer's, so that a training
    never mixes them."""
    return spec.scorer or f"{model}#{template.sha256()[:8]}"


@dataclass
class Usage:
    """What was paid so far: prompts answered, tokens in and out where they are known. ``cut``:
    answers that ended at the token limit."""

    answers: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answerer(Protocol):
    """Answers prompts in batches. An implementation answers the same prompt the same way whatever
    else is in the batch."""

    @property
    def name(self) -> str:
        """The scorer: what the column ``scorer`` says."""
        ...

    @property
    def batch_size(self) -> int:
        """How many prompts to hand over at once: enough to keep it busy."""
        ...

    @property
    def usage(self) -> Usage:
        """What was paid so far."""
        ...

    @property
    def template(self) -> Template | None:
        """The words of its prompts; ``None``: it reads no words."""
        ...

    def generation(self) -> dict[str, Any]:
        """Everything besides the items that an answer depends on: model, prompt, parameters.
        JSON; part of the cache key and stored with each row. Holds no secrets."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Who answered, as far as it is known by now, for the record of a run; no part of what
        makes two runs the same. Holds no secrets."""
        ...

    def fingerprint(self, item: Item) -> bytes:
        """A digest of what the answerer sees of an item, ground truth of a query left out."""
        ...

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts, one answer each, in order."""
        ...


class Flight(Protocol):
    """Prompts on their way: handed over with a ticket, answered in any order."""

    @property
    def room(self) -> int:
        """How many more prompts are wanted."""
        ...

    def send(self, ticket: bytes, prompt: Prompt) -> None:
        """Hand a prompt over."""
        ...

    def receive(self, wait: float) -> list[tuple[bytes, Answer]]:
        """What has arrived; waits at most ``wait`` seconds for the first."""
        ...

    def land(self) -> list[tuple[bytes, Answer]]:
        """The end: nothing more is asked. What has arrived is paid for, so it is given back."""
        ...


@runtime_checkable
class Endpoint(Protocol):
    """An answerer whose prompts overtake each other, such as an endpoint."""

    def flight(self) -> Flight:
        """A way for prompts, open until it lands."""
        ...


class BatchFlight:
    """Prompts on their way to an answerer that takes them in batches."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._line: list[tuple[bytes, Prompt]] = []

    @property
    def room(self) -> int:
        """What a full batch lacks."""
        return max(0, self._answerer.batch_size - len(self._line))

    def send(self, ticket: bytes, prompt: Prompt) -> None:
        """Put a prompt in line."""
        self._line.append((ticket, prompt))

    def receive(self, wait: float) -> list[tuple[bytes, Answer]]:
        """The answers of the batch in line."""
        batch, self._line = self._line, []
        answers = self._answerer.answer([prompt for _, prompt in batch])
        return [(ticket, a) for (ticket, _), a in zip(batch, answers, strict=True)]

    def land(self) -> list[tuple[bytes, Answer]]:
        """Nothing: a batch is received as soon as it is answered."""
        return []


_READERS = 4  # threads that read and hash image files
_UNREADABLE = bytes(32)


def seen(answerer: Answerer, items: Sequence[Item]) -> list[bytes]:
    """Fingerprints of items, 32 bytes each; zeros where an image cannot be read.

    What depends on answers depends on these. Image files are read side by side, each once.
    """
    one_each = {item.image: item for item in items}
    with ThreadPoolExecutor(_READERS) as readers:  # the answerer keeps what it read
        list(readers.map(partial(_seen, answerer), one_each.values()))
    return [_seen(answerer, item) for item in items]


def _seen(answerer: Answerer, item: Item) -> bytes:
    try:
        return answerer.fingerprint(item)
    except OSError:  # no answer either: its rows say why
        return _UNREADABLE


def canonical(value: object) -> bytes:
    """JSON with sorted keys: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass
class ShownFingerprints:
    """Fingerprints of items by what a model is shown: image bytes, question, answer; kept."""

    _known: dict[int, tuple[Item, bytes]] = field(default_factory=dict)
    _images: dict[Path, str] = field(default_factory=dict)

    def of(self, item: Item) -> bytes:
        """32 bytes; the image file is read once. Raises ``OSError`` where it cannot be read."""
        found = self._known.get(id(item))
        if found is None or found[0] is not item:
            image = None if item.image is None else self._image(item.image)
            shown = [item.question, item.answer, image, *([item.fields] if item.fields else [])]
            found = (item, hashlib.sha256(canonical(shown)).digest())
            self._known[id(item)] = found
        return found[1]

    def _image(self, path: Path) -> str:
        if path not in self._images:
            self._images[path] = hashlib.sha256(shown_bytes(path)[0]).hexdigest()
        return self._images[path]
