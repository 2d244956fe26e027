"""The prompt of a candidate, to the letter: as it is stored, or read again from its run's record.

In go a candidate's row and the store's items; out comes what was said, by whom, and how sure that
is. A rollout does not store the words with every row: its run holds the template, the store the
items.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_board.page import PageRequest
from lever_data.items.items import Place, some_items
from lever_data.items.prompts import Item, Prompt, Template
from lever_data.store.store import Run

LONGEST = 20_000  # characters of a turn that are shown


@dataclass(frozen=True)
class Words:
    """A prompt as a page shows it. ``turns``: (role, words), without a role where it is one text;
    ``title`` and ``note``: what kind of a record this is."""

    title: str
    note: str = ""
    turns: tuple[tuple[str, str], ...] = ()


_UNREAD = Words("No prompt", "The answerer nearest compares vectors and reads no words.")
_UNKNOWN = Words("The prompt is not known", "An item of it, or its picture, is not stored.")
_ASSUMED = (
    "This run has no record of its prompts: it was made before lever kept one, or elsewhere. These "
    "are the words of lever's default template, which need not be those that were sent."
)
_JOINED = "The model's own chat template joins these turns; where it has none, they are one text."
_LATER = "The items were ingested again after this run: these are their words of today."


class PromptReader:
    """Reads the prompts of one query's candidates.

    Args:
        asked: the page.
        place: dataset and split of the query.
        query_id: the query.
        shown: ids of all demonstrations its candidates show.
    """

    def __init__(
        self, asked: PageRequest, place: tuple[str, str], query_id: int, shown: Iterable[int]
    ) -> None:
        self._asked, self._place, self._query_id = asked, place, query_id
        self._ids = {*shown, query_id}
        self._runs = {run.run: run for run in asked.state.all_runs}
        self._items: dict[tuple[str, str | None, str | None], dict[int, Item]] = {}

    def words(self, row: Mapping[str, Any]) -> Words:
        """What the answerer of this candidate read."""
        extra = json.loads(row["extra"]) if row["extra"] else {}
        if isinstance(stored := extra.get("vqa_prompt_text"), str):
            return Words("The prompt, as stored", turns=(("", _clipped(stored)),))
        run = self._runs.get(row["run"])
        while run is not None and run.kind == "rescore":  # the answers are those of its parent
            run = self._runs.get(run.parents[0])
        if run is None or "prompts" not in run.details:
            return self._assumed(row["pointer"])
        record = run.details["prompts"]
        if record["api"] is None:
            return _UNREAD
        images = record["image_root"], record["image_name"]
        prompt = self._prompt(row["pointer"], record["candidate_split"], *images)
        if prompt is None:
            return _UNKNOWN
        template = Template(**record["template"])
        notes = [] if record["is_sent"] else [_JOINED]
        notes += [_LATER] if self._is_older(run, record["candidate_split"]) else []
        turns = _turns(template, prompt)
        if record["api"] == "completions":
            turns = (("", _clipped(template.text(prompt))),)
        return Words("The prompt, as it was sent", " ".join(notes), turns)

    def _assumed(self, pointer: Sequence[int]) -> Words:
        root = self._asked.board.images
        for split in dict.fromkeys(("train", self._place[1])):
            prompt = self._prompt(pointer, split, None if root is None else str(root), None)
            if prompt is not None:
                title = "The prompt in lever's default words"
                return Words(title, _ASSUMED, _turns(Template(), prompt))
        return _UNKNOWN

    def _prompt(
        self, pointer: Sequence[int], split: str, root: str | None, name: str | None
    ) -> Prompt | None:
        """What was shown, demonstrations of ``split``; ``None``: the store lacks a part of it."""
        query = self._of(self._place[1], root, name).get(self._query_id)
        known = self._of(split, root, name)
        items = [item for number in pointer if (item := known.get(number)) is not None]
        if query is None or len(items) < len(pointer):
            return None
        if root is not None and any(item.image is None for item in (query, *items)):
            return None
        return Prompt(query, tuple(items))

    def _of(self, split: str, root: str | None, name: str | None) -> dict[int, Item]:
        key = split, root, name
        if key not in self._items:
            place = Place(self._place[0], split, None if root is None else Path(root), name)
            self._items[key] = some_items(self._asked.state.session().con, place, self._ids)
        return self._items[key]

    def _is_older(self, run: Run, candidate_split: str) -> bool:
        """Whether items of its splits were ingested after the run was made."""
        since = self._asked.state.all_runs
        return any(
            later.kind == "examples"
            and later.dataset == run.dataset
            and later.split in (run.split, candidate_split)
            for later in since[since.index(run) + 1 :]
        )


def _turns(template: Template, prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Who says what."""
    return tuple((turn.role, _clipped(turn.shown)) for turn in template.turns(prompt))


def _clipped(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}… ({len(words):,} characters)"
