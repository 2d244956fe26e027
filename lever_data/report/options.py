"""What the user asks of an audit, a comparison and a correction. Light: commands are made of it."""

from __future__ import annotations

from pydantic import Field

from lever_data.options import Section, option
from lever_data.relations.reward_spec import RewardSpec
from lever_data.vocabulary import (
    Annotations,
    Questions,
    RunName,
    RunNames,
    Scorer,
    Seed,
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
    allow_missing: bool = option(False, "Leave rows without annotation as they are.")
