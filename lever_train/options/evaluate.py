"""What the user asks of an evaluation, as plain data. A field with ``help`` is an option.

Nothing is read here and nothing heavy is imported: the command line is made from these fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lever_data.errors import UsageError
from lever_train.options.rollout import AnswererSpec


def _help(text: str, **more: str) -> dict[str, str]:
    return {"help": text, **more}


@dataclass(frozen=True)
class Questions:
    """Which questions, and what they may be shown.

    ``split`` holds the queries, ``candidate_split`` the demonstrations. Without ``pool`` the
    store's pools count, and without those every example is in every pool.
    """

    dataset: str | None = field(default=None, metadata=_help("Dataset of the queries."))
    split: str = field(default="val", metadata=_help("Split of the queries."))
    candidate_split: str = field(
        default="train", metadata=_help("Split the demonstrations come from.")
    )
    query_embeddings: str | None = field(
        default=None, metadata=_help("File, or name in the store; row = query id.")
    )
    candidate_embeddings: str | None = field(
        default=None, metadata=_help("File, or name in the store; row = example id.")
    )
    pool: str | None = field(
        default=None, metadata=_help("[n, K] .npy of example ids, row = query id.", metavar="FILE")
    )
    questions: Path | None = field(
        default=None,
        metadata=_help("Official VQA questions of the split; else what the store holds."),
    )
    annotations: Path | None = field(
        default=None, metadata=_help("Official VQA annotations of the split.")
    )
    image_root: Path | None = field(
        default=None, metadata=_help("Folder of the images.", metavar="DIR")
    )


@dataclass(frozen=True)
class Contest:
    """How selectors are compared."""

    shots: tuple[int, ...] = field(
        default=(1, 2, 3, 4), metadata=_help("Numbers of demonstrations to show.")
    )
    limit: tuple[int, ...] = field(
        default=(), metadata=_help("Score the first so many questions, for each of these numbers.")
    )
    seed: int = field(default=0, metadata=_help("Of the random picks."))
    oracle: str = field(
        default="auto",
        metadata=_help("Ask about every demonstration of every pool: yes, no, or auto (nearest)."),
    )
    device: str = field(default="cpu", metadata=_help("Where selectors and a local model run."))
    answerer_query_embeddings: str | None = field(
        default=None,
        metadata=_help("What `nearest` compares, where it is not what the selector sees."),
    )
    answerer_candidate_embeddings: str | None = field(
        default=None, metadata=_help("Likewise for the demonstrations.")
    )


@dataclass(frozen=True)
class EvalRequest:
    """A whole evaluation: where, of what, on what, by whom.

    ``names`` of the checkpoints; without them their files' names.
    """

    store: Path
    checkpoints: tuple[Path, ...]
    questions: Questions
    contest: Contest = field(default_factory=Contest)
    answerer: AnswererSpec = field(default_factory=AnswererSpec)
    runs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: it says what.
        """
        contest = self.contest
        if (
            not contest.shots
            or min(contest.shots) < 1
            or len(set(contest.shots)) < len(contest.shots)
        ):
            raise UsageError("--shots are distinct numbers from 1 on", value=contest.shots)
        if any(limit < 1 for limit in contest.limit):
            raise UsageError("--limit is a number of questions above 0", value=contest.limit)
        if contest.oracle not in ("auto", "yes", "no"):
            raise UsageError("--oracle is auto, yes or no", value=contest.oracle)
        if (self.questions.questions is None) != (self.questions.annotations is None):
            raise UsageError("--questions and --annotations belong together: give both or neither")

    @property
    def wants_oracle(self) -> bool:
        """Asking n · K · shots times is cheap for the embedded answerer only."""
        if self.contest.oracle == "auto":
            return self.answerer.spec == "nearest"
        return self.contest.oracle == "yes"
