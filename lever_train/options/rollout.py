"""What the user asks of a rollout: picklable, so that it travels to workers.

Nothing is read here; :mod:`lever_train.rollout.resolve` resolves a request against the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lever_data.errors import UsageError
from lever_data.items.task import TaskGiven
from lever_data.options import Positive, Section, option, words
from lever_data.vocabulary import (
    DEFAULT_STORE,
    Annotations,
    CandidateEmbeddings,
    Dataset,
    Device,
    ImageName,
    ImageRoot,
    Limit,
    Pool,
    QueryEmbeddings,
    Questions,
    RunNames,
    Seed,
    Split,
    SqlDir,
    StorePath,
)
from lever_train.options.engine import Engine

MAX_SHOTS = 4
Count = Annotated[int, Field(ge=0)]
ShotNum = Annotated[int, words("Demonstrations per pointer.", everyday=True, ge=1, le=MAX_SHOTS)]
AnswererName = Annotated[
    str,
    words(
        "Who answers: nearest, transformers:NAME or openai:URL (its key in OPENAI_API_KEY).",
        "--answerer",
        everyday=True,
    ),
]


class Which(Section):
    """Which queries, of which runs.

    ``dataset`` and ``split`` may stay open where the runs or the view hold only one.
    """

    store: StorePath = DEFAULT_STORE
    runs: RunNames = ()
    sql_dir: SqlDir = None
    dataset: Dataset = None
    split: Split = None
    task: TaskGiven = None
    candidate_split: str | None = option(
        None,
        "Split the demonstrations come from. Default: the queries' own, or train where "
        "--candidate-embeddings is given.",
        metavar="NAME",
    )
    queries: str | None = option(None, "Only the queries of this view.", metavar="VIEW")
    limit: Limit = None
    target_view: str | None = option(
        None, "More candidates for the queries of this view, none stored already.", metavar="VIEW"
    )
    from_view: str | None = option(
        None, "Answer and score the pointers this view holds, proposing none.", metavar="VIEW"
    )

    @model_validator(mode="after")
    def _of_one_view(self) -> Self:
        chosen = [v for v in (self.queries, self.target_view, self.from_view) if v is not None]
        if len(chosen) > 1:
            raise UsageError(
                "only one of --queries, --target-view and --from-view can be meant", value=chosen
            )
        return self


class QueryFiles(Section):
    """The files that say what queries are and what they may be shown.

    Without ``pool`` the store's pools count, and without those every example is in every pool.
    """

    query_embeddings: QueryEmbeddings = None
    candidate_embeddings: CandidateEmbeddings = None
    pool: Pool = None
    questions: Questions = None
    annotations: Annotations = None
    image_root: ImageRoot = None
    image_name: ImageName = None

    @model_validator(mode="after")
    def _both_files(self) -> Self:
        if (self.questions is None) != (self.annotations is None):
            raise UsageError("--questions and --annotations go together")
        return self


class Inputs(QueryFiles):
    """The files a rollout reads, and the device that proposes."""

    checkpoint: Path | None = option(
        None, "The policy. Default: similarity alone.", metavar="FILE", everyday=True
    )
    device: Device = "cpu"


class Recipe(Section):
    """What to propose for each query; the defaults are those of the legacy script."""

    num_beams: Count = option(5, "Beams of the policy.")
    temps: tuple[Positive, ...] = option((1.0, 1.3), "Sampling temperatures.")
    num_samples_per_temp: Count = option(2, "Samples for each temperature.")
    num_random: Count = option(1, "Random pointers.")
    num_retrieval: Count = option(0, "Windows of the ranking by similarity.")
    zero_shot: bool = option(
        False,
        "Also each question alone, with no demonstration (gen_method empty): what a selector that "
        "may show nothing learns from.",
        "--zero-shot",
    )
    last_alone: bool = option(
        False,
        "Beams differ in their last demonstration alone; those before are the policy's favourites.",
    )
    seed: Seed = 0
    # decided by the rollout, no options: later rounds draw fresh samples and search wider, for the
    # best beams are known by then
    shot_num: int = 2
    round: int = 0
    last_step: bool = False  # of InfoScore: see lever_train/rollout/infoscore.py

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.per_query == 0:
            raise UsageError("nothing to propose: every number of candidates is 0")
        if len(set(self.temps)) < len(self.temps):
            raise UsageError("--temps are distinct temperatures above 0", value=self.temps)
        return self

    @property
    def beam_width(self) -> int:
        """Beams of this round."""
        return self.num_beams * (self.round + 1)

    @property
    def per_query(self) -> int:
        """Candidates per query before duplicates are dropped, in the first round."""
        sampled = len(self.temps) * self.num_samples_per_temp
        return self.num_beams + sampled + self.num_random + self.num_retrieval + self.zero_shot


class BeamShape(Section):
    """How far a search for InfoScore beams reaches."""

    beam_size: int = option(5, "Sequences kept.", ge=1)
    info_score: Literal["gain", "legacy"] = option(
        "gain",
        "What a sequence is ranked by: gain in log-probability over no demonstrations, or the "
        "difference of probabilities that the last one made, built leftwards.",
    )

    def recipe(self) -> Recipe:
        """The search as a recipe."""
        return Recipe(num_beams=self.beam_size, last_step=self.info_score == "legacy")


class AnswererSpec(Section):
    """Who answers and how. An endpoint's key comes from the environment and never stands here."""

    spec: AnswererName = "nearest"
    model: str | None = option(None, "The endpoint's name of the model.", everyday=True)
    scorer: str | None = option(
        None,
        "Name of the scorer in the store. Default: the model and a digest of the prompt's words.",
    )
    api: Literal["chat", "completions"] = option(
        "chat", "How a model is asked: chat, or completions for a base model (no images)."
    )
    prompt_form: Literal["message", "lines", "turns"] | None = option(
        None,
        "Demonstrations in one message, one a line, or as turns of a conversation. Default: "
        "message; with --api completions lines.",
    )
    system_prompt: Path | None = option(
        None,
        "File of the system prompt; an empty one leaves it out. Default: our own words; with --api "
        "completions none.",
    )
    images: bool = option(
        True,
        "Whether prompts show the images, where the answerer looks at them.",
        "--images/--without-images",
    )
    stop: tuple[str, ...] = option(
        (),
        "Words that end an answer. Default: the task's, where a text is continued.",
        metavar="WORD",
    )
    cut_at: tuple[str, ...] = option(
        (),
        "Where an answer is cut off before it is scored; '' cuts nowhere. Default: as the task "
        "says; at Question, Answer, Short and ', ' for vqa.",
        metavar="TEXT",
    )
    max_new_tokens: int = option(5, "Length of an answer in tokens.", ge=1)
    num_beams: int = option(3, "Beams of the answering model.", "--generation-beams", ge=1)
    length_penalty: float = option(0.0, "Of the answering model's beams.")
    log_probs: bool | None = option(
        None,
        "Probabilities of the ground truth. Default: yes where they cost little, not of an "
        "endpoint, which is asked once more for every answer.",
        "--gt-prob/--no-gt-prob",
    )
    batch_size: int | None = option(None, "Prompts per batch of the answerer.", ge=1)
    concurrency: int = option(16, "Requests at a time, of an endpoint.", ge=1)
    timeout: float = option(120.0, "Seconds a request may take.", gt=0)
    patience: float = option(600.0, "Seconds an endpoint may fail to answer a prompt.", ge=0)
    # decided by who asks, no options: the device is the rollout's, and a search for beams wants
    # log-probabilities alone, no text
    device: str = "cpu"
    generate: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.api == "completions" and self.prompt_form == "turns":
            raise UsageError("completions take a text, not turns", hint="--prompt-form lines")
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be above 0", value=self.max_new_tokens)
        return self


class Request(Section):
    """A whole rollout.

    ``shot_num`` ``None``: the largest of ``shots``, else 2, else what the view's pointers have.
    """

    which: Which = Field(default_factory=Which)
    inputs: Inputs = Field(default_factory=Inputs)
    recipe: Recipe = Field(default_factory=Recipe)
    answerer: AnswererSpec = Field(default_factory=AnswererSpec)
    shot_num: ShotNum | None = option(
        None,
        "Demonstrations per pointer, 1-4. Default: the largest of --shots, else 2, else what "
        "the view has.",
        everyday=True,
    )
    shots: tuple[ShotNum, ...] = option((), "Also score these prefixes of every pointer: 1,2,3,4.")
    allow_fallback: bool = option(
        False, "Score by string matching where there is no annotation; every such row says so."
    )
    budget: int | None = option(
        None,
        "With --target-view: at most N new candidates in all, in rounds, for queries whose "
        "rewards are still all equal.",
        metavar="N",
        ge=1,
    )
    shard_size: int = option(256, "Queries per shard.", ge=1)
    max_failed: float = option(
        0.05,
        "Share of failed answers at which to stop, from 32 answers on; 1: never.",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.budget is not None and self.which.target_view is None:
            raise UsageError("--budget goes with --target-view", value=self.budget)
        if self.shots and self.shot_num is not None and max(self.shots) > self.shot_num:
            raise UsageError(
                "--shots asks for longer prefixes than --shot-num gives",
                value=f"{max(self.shots)} > {self.shot_num}",
            )
        return self

    @property
    def proposed_shots(self) -> int:
        """The length of proposed pointers."""
        return max(self.shots, default=2) if self.shot_num is None else self.shot_num


class Execution(Engine):
    """Where shards are made."""

    shard: str = option("0/1", "Only the shards of machine i of 0...n-1.", metavar="i/n")

    @property
    def part(self) -> tuple[int, int]:
        """Only every n-th shard is made, from the i-th on: (i, n)."""
        index, _, count = self.shard.partition("/")
        return int(index), int(count)

    @field_validator("shard")
    @classmethod
    def _a_part(cls, text: str) -> str:
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UsageError("--shard is i/n with 0 <= i < n", value=text, hint="--shard 0/8")
        return text
