"""What the user asks of a rollout, as plain data: picklable, so that it travels to workers.

Nothing is read here; :mod:`resolve` resolves a request against the store. A field with ``help`` is
an option of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lever_data.errors import UsageError

MAX_SHOTS = 4


def _help(text: str, **more: str) -> dict[str, str]:
    """Metadata of a field that is an option; ``metavar`` and ``flag`` may be given."""
    return {"help": text, **more}


@dataclass(frozen=True)
class Which:
    """Which queries, of which runs.

    ``dataset`` and ``split`` may stay open where the runs or the view hold only one.
    """

    store: Path
    runs: tuple[str, ...] = ()
    sql_dir: Path | None = None
    dataset: str | None = field(default=None, metadata=_help("Dataset of the queries."))
    split: str | None = field(default=None, metadata=_help("Split of the queries."))
    candidate_split: str | None = field(
        default=None,
        metadata=_help(
            "Split the demonstrations come from. Default: the queries' own, or train where "
            "--candidate-embeddings is given.",
        ),
    )
    queries: str | None = field(
        default=None, metadata=_help("Only the queries of this view.", metavar="VIEW")
    )
    limit: int | None = field(default=None, metadata=_help("Only the first so many queries."))
    target_view: str | None = field(
        default=None,
        metadata=_help(
            "More candidates for the queries of this view, none stored already.", metavar="VIEW"
        ),
    )
    from_view: str | None = field(
        default=None,
        metadata=_help(
            "Answer and score the pointers this view holds, proposing none.", metavar="VIEW"
        ),
    )


@dataclass(frozen=True)
class Inputs:
    """The files a rollout reads, and the device that proposes."""

    query_embeddings: str | None = field(
        default=None, metadata=_help("File, or name in the store; row = query id.")
    )
    candidate_embeddings: str | None = field(
        default=None, metadata=_help("Where they differ from the queries'; row = example id.")
    )
    pool: Path | None = field(
        default=None,
        metadata=_help(
            "[n, K] .npy of example ids, row = query id. Default: the pools in the store, else one "
            "pool of all examples its pointers name, else of all examples.",
        ),
    )
    checkpoint: Path | None = field(
        default=None, metadata=_help("The policy. Default: similarity alone.")
    )
    questions: Path | None = field(
        default=None, metadata=_help("Official VQA questions of the queries' split.")
    )
    annotations: Path | None = field(
        default=None, metadata=_help("Official VQA annotations of the queries' split.")
    )
    image_root: Path | None = field(
        default=None, metadata=_help("Folder of the images.", metavar="DIR")
    )
    device: str = field(
        default="cpu", metadata=_help("Where the policy and a local model run: cpu, cuda, mps.")
    )


@dataclass(frozen=True)
class Recipe:
    """What to propose for each query; the defaults are those of the legacy script.

    ``shot_num``: length of the pointers. ``round`` tells later helpings apart: their samples are
    fresh and their beams reach further.
    """

    num_beams: int = field(default=5, metadata=_help("Beams of the policy."))
    temps: tuple[float, ...] = field(default=(1.0, 1.3), metadata=_help("Sampling temperatures."))
    num_samples_per_temp: int = field(default=2, metadata=_help("Samples for each temperature."))
    num_random: int = field(default=1, metadata=_help("Random pointers."))
    num_retrieval: int = field(default=0, metadata=_help("Windows of the ranking by similarity."))
    seed: int = field(default=0, metadata=_help("Seed of samples and random pointers."))
    shot_num: int = 2
    round: int = 0

    @property
    def beam_width(self) -> int:
        """Later rounds search wider: the best beams are known by then."""
        return self.num_beams * (self.round + 1)

    @property
    def per_query(self) -> int:
        """Candidates per query before duplicates are dropped, in the first round."""
        sampled = len(self.temps) * self.num_samples_per_temp
        return self.num_beams + sampled + self.num_random + self.num_retrieval


@dataclass(frozen=True)
class AnswererSpec:
    """Who answers and how. An endpoint's key comes from the environment and never stands here."""

    spec: str = field(
        default="nearest",
        metadata=_help(
            "nearest, transformers:NAME or openai:URL (its key in OPENAI_API_KEY).",
            flag="--answerer",
        ),
    )
    model: str | None = field(default=None, metadata=_help("The endpoint's name of the model."))
    max_new_tokens: int = field(default=5, metadata=_help("Length of an answer in tokens."))
    num_beams: int = field(
        default=3, metadata=_help("Beams of the answering model.", flag="--generation-beams")
    )
    length_penalty: float = field(default=0.0, metadata=_help("Of the answering model's beams."))
    log_probs: bool = field(
        default=True,
        metadata=_help(
            "Probabilities of the ground truth, where the answerer has them.", flag="--gt-prob"
        ),
    )
    batch_size: int | None = field(
        default=None, metadata=_help("Prompts per batch.", flag="--answer-batch")
    )
    concurrency: int = field(default=16, metadata=_help("Requests at a time, of an endpoint."))
    timeout: float = field(default=120.0, metadata=_help("Seconds a request may take."))
    patience: float = field(
        default=600.0, metadata=_help("Seconds an endpoint may fail to answer a prompt.")
    )
    device: str = "cpu"
    generate: bool = True  # off: only log-probabilities are wanted, no text


@dataclass(frozen=True)
class Request:
    """A whole rollout.

    ``shot_num`` ``None``: the largest of ``shots``, else 2, else what the view's pointers have.
    """

    which: Which
    inputs: Inputs = field(default_factory=Inputs)
    recipe: Recipe = field(default_factory=Recipe)
    answerer: AnswererSpec = field(default_factory=AnswererSpec)
    shot_num: int | None = field(
        default=None,
        metadata=_help(
            "Demonstrations per pointer, 1-4. Default: the largest of --shots, else 2, else what "
            "the view has.",
        ),
    )
    shots: tuple[int, ...] = field(
        default=(), metadata=_help("Also score these prefixes of every pointer: 1,2,3,4.")
    )
    allow_fallback: bool = field(
        default=False,
        metadata=_help(
            "Score by string matching where there is no annotation; every such row says so."
        ),
    )
    budget: int | None = field(
        default=None,
        metadata=_help(
            "With --target-view: so many new candidates in all, in rounds, for queries whose "
            "rewards are still all equal.",
        ),
    )
    shard_size: int = field(default=256, metadata=_help("Queries per shard."))

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: it says what.
        """
        which = self.which
        chosen = [v for v in (which.queries, which.target_view, which.from_view) if v is not None]
        if len(chosen) > 1:
            raise UsageError(
                "only one of --queries, --target-view and --from-view can be meant", value=chosen
            )
        if self.budget is not None and (which.target_view is None or self.budget < 1):
            raise UsageError(
                "--budget is a number of candidates above 0 that goes with --target-view",
                value=self.budget,
            )
        for name, value in (("--limit", which.limit), ("--shard-size", self.shard_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be above 0", value=value)
        if (self.inputs.questions is None) != (self.inputs.annotations is None):
            raise UsageError("--questions and --annotations go together")
        _check_recipe(self.recipe)
        self._check_shots()

    def _check_shots(self) -> None:
        numbers = [*self.shots, *([] if self.shot_num is None else [self.shot_num])]
        if any(not 1 <= k <= MAX_SHOTS for k in numbers):
            raise UsageError(f"shot numbers lie between 1 and {MAX_SHOTS}", value=numbers)
        if self.shots and self.shot_num is not None and max(self.shots) > self.shot_num:
            raise UsageError(
                "--shots asks for longer prefixes than --shot-num gives",
                value=f"{max(self.shots)} > {self.shot_num}",
            )

    @property
    def proposed_shots(self) -> int:
        """The length of proposed pointers."""
        return self.shot_num or max(self.shots, default=2)


def _check_recipe(recipe: Recipe) -> None:
    counts = {
        "--num-beams": recipe.num_beams,
        "--num-samples-per-temp": recipe.num_samples_per_temp,
        "--num-random": recipe.num_random,
        "--num-retrieval": recipe.num_retrieval,
    }
    for name, value in counts.items():
        if value < 0:
            raise UsageError(f"{name} cannot be negative", value=value)
    if recipe.per_query == 0:
        raise UsageError("nothing to propose: every number of candidates is 0")
    if any(not tau > 0 for tau in recipe.temps) or len(set(recipe.temps)) < len(recipe.temps):
        raise UsageError("--temps are distinct temperatures above 0", value=recipe.temps)
