"""What the user asks of an audit, a comparison and a correction. Light: commands are made of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lever_data.items.task import TaskGiven
from lever_data.options import Section, option
from lever_data.relations.reward_spec import RewardSpec
from lever_data.vocabulary import (
    Annotations,
    Dataset,
    Questions,
    RunName,
    RunNames,
    Scorer,
    Seed,
    Split,
    SqlDir,
)


class AuditRequest(Section):
    """What to audit."""

    view: str = option(
        "all_candidates",
        "The view to audit, a relation with the training columns.",
        metavar="VIEW",
        everyday=True,
    )
    dataset: Dataset = None
    split: Split = None
    reward: RewardSpec = Field(default_factory=RewardSpec)
    runs: RunNames = ()
    scorer: Scorer = None
    sql_dir: SqlDir = None
    policy: str | None = option(
        None,
        "Relation (dataset, split, query_id, pointer, logprob) of the policy that importance "
        "weights ask about. Default: the stored log-probabilities.",
        metavar="VIEW",
    )


class DiffRequest(Section):
    """What to compare: of one name a run wins over a view."""

    a: str = option(..., "A run, RUN:SELECTOR of an evaluation, or a view.", argument=True)
    b: str = option(..., "The same kind of thing.", argument=True)
    runs: RunNames = ()
    sql_dir: SqlDir = None
    seed: Seed = 0


class RescoreRequest(Section):
    """What to rescore."""

    run: RunName
    questions: Questions = None
    annotations: Annotations = None
    task: TaskGiven = None
    cut_at: tuple[str, ...] = option(
        (),
        "Where the stored texts are cut off anew to become answers; '' cuts nowhere. Default: "
        "answers that were read as the task says stay.",
        metavar="TEXT",
    )
    allow_missing: bool = option(
        False, "Leave rows without annotation, or without a text to read anew, as they are."
    )


class Cost(Section):
    """What the answers cost"""

    answers_per_query: int = option(
        2, "Answers a query costs: one per selector and shot number.", metavar="N", ge=1
    )
    prompt_tokens: int | None = option(None, "Tokens of a prompt.", metavar="N", ge=1)
    answer_tokens: int | None = option(None, "Tokens of an answer.", metavar="N", ge=1)
    prompt_price: float = option(0.0, "Price of a million prompt tokens.", metavar="X", ge=0)
    answer_price: float = option(0.0, "Price of a million answer tokens.", metavar="X", ge=0)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Of a prompt and of its answer; ``None`` where they are not both known."""
        if self.prompt_tokens is None or self.answer_tokens is None:
            return None
        return self.prompt_tokens, self.answer_tokens

    @property
    def prices(self) -> tuple[float, float] | None:
        """Of a million tokens of either; ``None`` where no price is given."""
        found = self.prompt_price, self.answer_price
        return found if any(found) else None


class PlanRequest(Section):
    """What to plan from, and for."""

    source: str = option(
        "all_candidates",
        "An evaluation RUN, whose selectors are to be told apart, or a view of scored candidates.",
        metavar="RUN|VIEW",
        argument=True,
    )
    difference: float = option(
        0.02, "True difference in accuracy to show.", everyday=True, gt=0, le=1
    )
    queries: tuple[Annotated[int, Field(ge=1)], ...] = option(
        (250, 500, 1000, 2000, 5000, 10000), "Numbers of queries to look at.", everyday=True
    )
    dataset: Dataset = None
    split: Split = None
    scorer: Scorer = None
    power: float = option(0.8, "Chance to see a difference that is there.", gt=0.05, lt=1)
    confidence: float = option(0.95, "1 - the chance to see one that is not.", gt=0, lt=1)
    looks: int = option(
        1, "Looks at the figures on the way, equally spaced, each of which may stop.", ge=1, le=50
    )
    cost: Cost = Field(default_factory=Cost)
    runs: RunNames = ()
    sql_dir: SqlDir = None
