"""What the user asks of an evaluation, and of the picks of a selector.

Nothing is read here and nothing heavy is imported: the command line is made from these models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lever_data.errors import UsageError
from lever_data.items.task import TaskGiven
from lever_data.options import Section, option
from lever_data.vocabulary import (
    DEFAULT_STORE,
    Dataset,
    Device,
    Limit,
    RunNames,
    Seed,
    StorePath,
    Vectors,
)
from lever_train.options.rollout import AnswererSpec, QueryFiles

Number = Annotated[int, Field(ge=1)]


class Questions(QueryFiles):
    """Which questions, and what they may be shown.

    ``split`` holds the queries, ``candidate_split`` the demonstrations.
    """

    dataset: Dataset = None
    split: str = option("val", "Split of the queries.", metavar="NAME", everyday=True)
    queries: str | None = option(None, "Only the queries of this view.", metavar="VIEW")
    candidate_split: str = option("train", "Split the demonstrations come from.", metavar="NAME")
    task: TaskGiven = None


class Figures(Section):
    """What is measured."""

    shots: tuple[Number, ...] = option(
        (1, 2, 3, 4), "Numbers of demonstrations to show.", everyday=True
    )
    limit: Limit = None
    sizes: tuple[Number, ...] = option(
        (), "Score the first N questions apart, for each of these numbers."
    )
    oracle: Literal["auto", "yes", "no"] = option(
        "auto", "Ask about every demonstration of every pool; auto: only with nearest."
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not self.shots or len(set(self.shots)) < len(self.shots):
            raise UsageError("--shots are distinct numbers from 1 on", value=self.shots)
        if self.limit is not None and max(self.sizes, default=0) > self.limit:
            raise UsageError(
                "--sizes asks for more questions than --limit leaves", value=self.sizes
            )
        return self

    @property
    def most(self) -> int | None:
        """How many questions are read; all where None."""
        return self.limit or max(self.sizes, default=None)


class Contest(Figures):
    """How selectors are compared."""

    device: Device = "cpu"
    answerer_query_embeddings: Vectors = option(
        None, "What nearest compares of a query, where it is not what the selector sees."
    )
    answerer_candidate_embeddings: Vectors = option(
        None, "What nearest compares of a demonstration, likewise."
    )


class EvalRequest(Section):
    """A whole evaluation: where, of what, on what, by whom.

    ``names`` of the checkpoints; without them their files' names. ``query_ids``: only these
    queries, those that there are; without them all.
    """

    store: StorePath = DEFAULT_STORE
    checkpoints: tuple[Path, ...] = option(
        (), "A selector: v3, v2 or v2format.", "--checkpoint", metavar="FILE", everyday=True
    )
    runs: RunNames = ()
    questions: Questions = Field(default_factory=Questions)
    contest: Contest = Field(default_factory=Contest)
    answerer: AnswererSpec = Field(default_factory=AnswererSpec)
    names: tuple[str, ...] = ()
    query_ids: tuple[int, ...] = ()

    @property
    def wants_oracle(self) -> bool:
        """Asking n · K · shots times is cheap for the embedded answerer only."""
        if self.contest.oracle == "auto":
            return self.answerer.spec == "nearest"
        return self.contest.oracle == "yes"
