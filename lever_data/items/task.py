"""A task as data: how an item is shown, how text becomes an answer, how an answer is scored.

In goes a name (``vqa``, ``qa``, ``choice``, ``caption``) or a TOML file with a table ``[task]``,
which says what differs from a built-in one; out comes a :class:`Task`. It is stored with the
examples it is of (:func:`stored_task`); nothing below rollout and report knows which it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import CUT_AT, FIELD, SYSTEM_PROMPT, Item
from lever_data.options import Section, option, words
from lever_data.toml import inside, read_toml, require_fields, validated

if TYPE_CHECKING:
    from lever_data.store.store import Run

VQA = "vqa-accuracy"
Name = Literal["vqa", "qa", "choice", "caption"]
_PLAIN: dict[str, Any] = {"system": "", "separator": "\n\n", "images": False, "cut_at": ("\n",)}
# what a built-in task has that `vqa`, whose values are the defaults of the fields, has not
_BUILT_IN: dict[Name, dict[str, Any]] = {
    "vqa": {},
    "qa": {
        **_PLAIN,
        "demonstration": "Question: {question}\nAnswer: {answer}",
        "query": "Question: {question}\nAnswer:",
        "stop": ("\n",),
        "metric": "squad-f1",
    },
    "choice": {
        **_PLAIN,
        "demonstration": "{question}\nAnswer: {answer}",
        "query": "{question}\nAnswer:",
        "stop": ("\n",),
        "metric": "label",
    },
    "caption": {
        **_PLAIN,
        "system": "You describe images. Follow the style of the demonstrations.",
        "demonstration": "Caption: {answer}",
        "query": "Caption:",
        "images": True,
        "stop": ("\n",),
        "metric": "cider-d",
        "correct_above": 0.1,
    },
}


class Task(Section):
    """How an item is shown, how a text becomes an answer, how an answer is scored.

    In templates ``{question}`` (or ``{input}``), ``{answer}`` and the names of an item's further
    fields, such as ``{context}``, stand for what the item holds.
    """

    name: Name = option("vqa", "The built-in task that gives what is not set here.")
    system: str = option(SYSTEM_PROMPT, "What a chat model is told first; empty: nothing.")
    demonstration: str = option(
        "Question:{question} Short answer:{answer}", "The words of a demonstration."
    )
    query: str = option("Question:{question} Short answer:", "The words of the query.")
    separator: str = option("", "What stands after each demonstration that shares a text.")
    images: bool = option(True, "Whether items are shown with their images.")
    stop: tuple[str, ...] = option((), "Words at which a model stops.")
    cut_at: tuple[str, ...] = option(CUT_AT, "Where an answer is cut off before it is scored.")
    normalize: Literal["none", "lower", "vqa", "squad"] = option(
        "none", "What is done to an answer before the metric, which has rules of its own, sees it."
    )
    metric: str = option(
        "vqa-accuracy",
        "What scores answers: vqa-accuracy, squad-f1, label, cider-d, rouge-l, or "
        "python:module.function.",
    )
    correct_above: float = option(
        0.0, "An answer is right whose score is above this; squad-f1 asks for a match.", ge=0, lt=1
    )

    @model_validator(mode="before")
    @classmethod
    def _built_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") in _BUILT_IN:
            return {**_BUILT_IN[given["name"]], **given}
        return given

    @model_validator(mode="after")
    def _words_fit(self) -> Self:
        if "answer" not in FIELD.findall(self.demonstration):
            raise UsageError("the demonstration does not show {answer}", value=self.demonstration)
        if "answer" in FIELD.findall(self.query):
            raise UsageError("the query shows its own {answer}", value=self.query)
        if not (FIELD.findall(self.query) or self.images):
            raise UsageError(
                "the query does not show its input",
                value=self.query,
                hint="{question}, another field of the items, or images = true",
            )
        return self

    def answer(self, generation: str) -> str:
        """The answer in a generated text: what stands before the first of ``cut_at``, stripped and
        normalised; an empty text in ``cut_at`` cuts nowhere."""
        text = generation.strip()
        found = [at for cut in self.cut_at if cut and (at := text.find(cut)) >= 0]
        return self.normalized(text[: min(found, default=None)].strip())

    def normalized(self, answer: str) -> str:
        """An answer as the metric sees it, by the rule ``normalize``."""
        if self.normalize == "none":
            return answer
        if self.normalize == "lower":
            return answer.lower()
        # here: `lever --help` reads this file, and goes without what the metrics need
        from lever_data.items.text_metrics import normalize_squad
        from lever_data.items.vqa_metric import normalize_answer

        return normalize_answer(answer) if self.normalize == "vqa" else normalize_squad(answer)

    def reading(self) -> str:
        """A digest of how a text becomes an answer; empty where it is as usual for the metric: cut
        at its line's end, of VQA as in the legacy system."""
        usual = CUT_AT if self.metric == "vqa-accuracy" else _PLAIN["cut_at"]
        if self.cut_at == usual and self.normalize == "none":
            return ""
        return reading_digest(self.normalize, self.cut_at)

    def with_field(self, name: str) -> Task:
        """The task with a field of the items on a line of its own before the words, where neither
        template shows it."""
        if name in FIELD.findall(self.demonstration + self.query):
            return self
        line = f"{{{name}}}\n" if name == "choices" else f"{name.capitalize()}: {{{name}}}\n"
        shown = {"demonstration": self.demonstration, "query": self.query}
        if name == "choices":  # they follow the question
            after = "{question}\n"
            return self.but(**{k: t.replace(after, after + line) for k, t in shown.items()})
        return self.but(**{k: line + text for k, text in shown.items()})

    def stored(self) -> dict[str, Any]:
        """As the examples' run holds it: what differs from ``vqa``."""
        return self.model_dump(mode="json", exclude_defaults=True)


def reading_digest(normalize: str, cut_at: Iterable[str]) -> str:
    """How a text becomes an answer, in eight hex digits."""
    return hashlib.sha256("\0".join([normalize, *cut_at]).encode()).hexdigest()[:8]


def read_task(given: Any) -> Any:
    """A task by the name of a built-in one or as a TOML file with a table ``[task]``.

    Raises:
        UsageError: it is neither, or the file says something that is not allowed.
    """
    if not isinstance(given, str | Path):
        return given
    if given in _BUILT_IN:
        return Task.model_validate({"name": given})
    path = Path(given)
    if path.suffix != ".toml":
        raise UsageError(
            "there is no such task",
            value=str(given),
            hint=f"{', '.join(_BUILT_IN)}, or a TOML file with a table [task]",
        )
    table = read_toml(path, "the task").get("task")
    if not isinstance(table, dict):
        raise UsageError("the file has no table [task]", where=str(path))
    require_fields(Task, table, "the task", f"{path}: [task]")
    return validated(Task, table, "the task", inside(str(path)))


TaskGiven = Annotated[
    Task | None,
    BeforeValidator(read_task),
    words(
        "The task: vqa, qa, choice, caption, or a TOML file with a table [task]. Default: as "
        "ingested, else vqa.",
        "--task",
        metavar="TASK",
    ),
]


def stored_task(runs: Iterable[Run], dataset: str | None, split: str | None) -> Task:
    """The task of the newest examples of a place; ``vqa`` where it holds none.

    Args:
        runs: oldest first, as the store lists them.
    """
    place = (dataset, split)
    found = [r for r in runs if r.kind == "examples" and (r.dataset, r.split) == place]
    return Task.model_validate(found[-1].parameters.get("task", {}) if found else {})


def require_shown(task: Task, items: Iterable[Item]) -> None:
    """Refuse a template that names a field which an item does not have.

    Raises:
        LeverError: it names the field, the item, and the fields there are.
    """
    named = set(FIELD.findall(task.demonstration + task.query)) - {"question", "input", "answer"}
    for item in items if named else ():
        if lacking := sorted(named - item.fields.keys()):
            raise LeverError(
                f"the task's template names {{{lacking[0]}}}, which an item does not have",
                where=f"item {item.example_id} of {item.dataset}/{item.split}",
                value=f"it has {', '.join(['question', 'answer', *sorted(item.fields)])}",
                hint=f"`lever ingest --field {lacking[0]}=COLUMN`, or another template (--task)",
            )


def is_vqa_scorer(scorer: str) -> bool:
    """Whether rows marked so (:meth:`.scoring.Scoring.scorer`) have the VQA accuracy."""
    _, other, metric = scorer.rpartition("~")
    return not other or metric.startswith(VQA)
