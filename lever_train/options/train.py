"""The one definition of every option of the trainer: name, type, default, bounds and help.

What comes in are the values ``options.resolve`` read from a TOML file (whose tables are the
sections below) and from flags; what comes out is a frozen, validated :class:`TrainConfig`. The
command line is made from these fields. Names and defaults are the legacy trainer's.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from lever_data.options import Positive, Section, Share, option
from lever_data.relations.reward_spec import RewardSpec
from lever_data.vocabulary import (
    DEFAULT_STORE,
    CandidateEmbeddings,
    Device,
    Pool,
    QueryEmbeddings,
    RunNames,
    Scorer,
    Seed,
    SqlDir,
    StorePath,
)

# a selector has 0.5 million parameters; what is beyond these is a slip of the pen
MAX_HIDDEN, MAX_LAYERS, MAX_SHOTS = 1 << 14, 256, 1024
MAX_PARAMETERS = 10**9

LEAST_MEMORY = 32 * 10**6  # with 16 MB DuckDB cannot sort a small store
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT])(i?)B", re.IGNORECASE)


Kind = Literal[
    "static", "gru", "gated", "decoder", "mmr", "additive", "bilinear", "stop", "features"
]


class DataConfig(Section):
    """What is trained on."""

    view: tuple[str, ...] = option(
        ("all_candidates",),
        "A view with the training columns; SFT takes beam_infoscore where none is named.",
        everyday=True,
    )
    query_embeddings: QueryEmbeddings = None
    candidate_embeddings: CandidateEmbeddings = None
    pool: Pool = None
    scorer: Scorer = None
    gen_method: tuple[str, ...] = option((), "Only candidates of this source.")
    skip_fallback: bool = option(
        False, "Leave out candidates scored by string matching, as the newest legacy trainer does."
    )
    require_positive_query: bool = option(
        False, "Only queries with at least one right candidate (correct) in the view."
    )
    shot_num: int | None = option(
        None, "Refuse pointers of another length; without it all lengths train together.", ge=1
    )
    allow_mixed: bool = option(False, "Train on several datasets or splits at once.")
    split_ratio: float = option(
        0.8, "Share of the queries to train on; 1.0: no validation.", gt=0, le=1
    )
    split_by: Literal["id", "hash"] = option("id", "Split by sorted query id (legacy) or its hash.")
    held_out: str | None = option(
        None,
        "Validate on the queries of this view, and train on the others, in place of a split by "
        "ratio.",
        metavar="VIEW",
    )
    order: Literal["random", "file"] = option("random", "Order of the groups in an epoch.")


class ModelConfig(Section):
    """The selector."""

    selector: Kind = option(
        "static", "Kind of selector: static scores do not depend on what was chosen, others do."
    )
    hidden: int = option(256, "Width h of the selector.", "--hidden-dim", ge=1, le=MAX_HIDDEN)
    num_layers: int = option(1, "Attention layers.", ge=0, le=MAX_LAYERS)
    num_heads: int = option(1, "Attention heads.", ge=1, le=MAX_HIDDEN)
    max_shots: int = option(4, "Steps that a selector with a memory knows.", ge=1, le=MAX_SHOTS)
    decoder_gru: bool = option(
        True, "decoder, mmr, additive, bilinear, stop: carry what was chosen in a GRU."
    )
    step_embedding: bool = option(True, "The same kinds: add an embedding of the step.")
    pair_features: tuple[str, ...] = option(
        (),
        "features: what it reads of every pair beside the vectors, by the names of "
        "sql/features/*.sql and <store>/features/*.sql.",
        "--pair-features",
        metavar="NAME",
    )
    votes: bool = option(
        False, "features: learn whose answers count, and score candidates by the pool's votes."
    )
    mixture: bool = option(
        False,
        "features: a later pick is worth a mixture of its own worth and that of those before, "
        "whose share is learned from candidates of several shots.",
    )
    low_rank: int = option(
        64, "features: rank of the bilinear term of the vectors; 0: none.", ge=0, le=MAX_HIDDEN
    )
    can_stop: bool = option(False, "features: may end a pointer early, or show nothing.")
    dropout: float = option(0.1, "Dropout of the projections.", ge=0, lt=1)
    attention_dropout: float = option(0.1, "Dropout of the attention weights.", ge=0, lt=1)
    label_smoothing: float = option(0.1, "Label smoothing of the cross-entropy losses.", ge=0, lt=1)
    sft_checkpoint: str | None = option(
        None, "Start from this checkpoint (v2, v2format or v3).", everyday=True
    )

    @property
    def ends_pointers(self) -> bool:
        """Whether the selector may end a pointer early, or show nothing."""
        return self.selector == "stop" or (self.selector == "features" and self.can_stop)

    @model_validator(mode="after")
    def _reads_features(self) -> Self:
        if (self.pair_features or self.votes) and self.selector != "features":
            raise ValueError(f"a {self.selector} selector reads no pair_features and no votes")
        if self.mixture and self.selector != "features":
            raise ValueError(f"a {self.selector} selector learns no mixture")
        if self.votes and not self.pair_features:
            raise ValueError("votes are read with pair_features: name at least one")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden {self.hidden}")
        return self

    @model_validator(mode="after")
    def _of_a_size(self) -> Self:
        parameters = (4 * self.num_layers + 2) * self.hidden**2
        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"{self.num_layers} layers of width {self.hidden} have {parameters:,} parameters, "
                f"at most {MAX_PARAMETERS:,} are trained: lower num_layers or hidden"
            )
        return self


class RceConfig(Section):
    """Reward-weighted cross-entropy."""

    epochs: int = option(5, "RCE epochs.", "--rce-epochs", everyday=True, ge=0)
    lr: Positive = option(1e-4, "Learning rate of RCE.", "--rce-lr")
    temperature_start: Positive = option(2.0, "τ at the first step.", "--rce-temperature-start")
    temperature_end: Positive = option(0.5, "τ at the last step.", "--rce-temperature-end")
    use_normalized_reward: bool = option(
        False,
        "Weights from z-scored rewards (newest legacy trainer), or from the raw ones (default).",
        "--rce-use-normalized-reward/--rce-use-raw-reward",
    )
    rank: bool = option(False, "Weights from ranks in [0, 1], ties averaged.", "--rce-rank")
    top1_only: bool = option(False, "Train on the first candidate alone.")

    @model_validator(mode="after")
    def _one_weighting(self) -> Self:
        if sum((self.use_normalized_reward, self.rank, self.top1_only)) > 1:
            raise ValueError("choose one of use_normalized_reward, rank and top1_only")
        return self


class GrpoConfig(Section):
    """Group-relative policy optimisation, after RCE."""

    epochs: int = option(
        0, "GRPO epochs; 0: the RCE model is the result.", "--grpo-epochs", everyday=True, ge=0
    )
    lr: Positive = option(1e-5, "Learning rate of GRPO.", "--grpo-lr")
    kl_beta_init: float = option(0.1, "β at the first step.", "--kl-beta", ge=0)
    kl_adaptive: bool = option(True, "Adapt β to the KL after every step.")
    kl_target_min: float = option(0.01, "KL below which β falls.", ge=0)
    kl_target_max: float = option(0.1, "KL above which β rises.", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "Estimator of the KL.")
    kl_direction: Literal["reference_policy", "policy_reference"] = option(
        "reference_policy", "KL(reference ‖ policy), the legacy one, or KL(policy ‖ reference)."
    )
    reference: Literal["sft", "rce"] = option("sft", "The policy π_old: before or after RCE.")
    advantage: Literal["zscore", "center", "loo", "rank"] = option("zscore", "Kind of advantage.")
    advantage_clip: Positive = option(5.0, "Advantages are clipped to ± this.")
    clip_epsilon: Share = option(0.2, "Ratios are clipped to 1 ± this.")
    clip_epsilon_high: float | None = option(None, "Upper clip, where it differs.", ge=0)
    dual_clip: float | None = option(None, "Bound of the loss where the advantage is < 0.", gt=1)
    early_epochs: int = option(1, "Epochs of the early top-k.", ge=0)
    early_top_k: int = option(3, "Candidates that train in the early epochs; 0: all.", ge=0)
    late_top_k: int = option(5, "Candidates that train after; 0: all.", ge=0)
    topk_baseline: Literal["full", "subset"] = option(
        "full", "Advantages over the full group, or over the top-k (legacy)."
    )
    importance_cap: float | None = option(
        None, "Weigh candidates by π_old / π_behaviour, truncated here.", gt=0
    )
    tied_kl: bool = option(False, "Tied groups keep their KL gradient.")
    freeze_backbone: bool = option(
        False, "Train the attention and its norms alone.", "--freeze-backbone-in-grpo"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.kl_target_min > self.kl_target_max:
            raise ValueError("kl_target_min is above kl_target_max")
        return self


class SftConfig(Section):
    """Supervised training on the best beam of InfoScore data."""

    epochs: int = option(20, "SFT epochs.", "--sft-epochs", ge=1)
    lr: Positive = option(1e-4, "Learning rate of SFT.", "--sft-lr")
    weight_decay: float = option(1e-3, "Weight decay of SFT.", "--sft-weight-decay", ge=0)
    all_beams: bool = option(
        False, "Train on all beams of a query, the mean of their losses (legacy), not on the best."
    )
    warm_up: Share = option(0.05, "Share of the steps with a rising rate.", "--warm-up")


class DenseConfig(Section):
    """Comparison of all candidates of a query; for rewards of many or all of its pool."""

    objective: Literal["listwise", "hinge", "pointwise"] = option(
        "listwise",
        "listwise: softmax(reward / τ) as the target; hinge: pairs of unequal reward; pointwise: "
        "each candidate's reward, cut to [0, 1], by itself.",
        "--dense-objective",
    )
    epochs: int = option(5, "Epochs of the dense stage.", "--dense-epochs", ge=1)
    lr: Positive = option(1e-3, "Its learning rate, which falls to 0.", "--dense-lr")
    weight_decay: float = option(0.05, "Its weight decay.", "--dense-weight-decay", ge=0)
    temperature: Positive = option(0.15, "τ of the listwise target.", "--dense-temperature")
    margin: Positive = option(1.0, "Margin of the hinge, in nats.", "--dense-margin")


class RunConfig(Section):
    """How it runs."""

    stage: Literal["rl", "sft", "dense"] = option(
        "rl",
        "rl: RCE, then GRPO if asked; sft: supervised; dense: all candidates compared.",
        everyday=True,
    )
    batch_size: int = option(1, "Groups per step.", everyday=True, ge=1)
    seed: Seed = 0
    device: Device = "cpu"
    precision: Literal["float32", "bf16"] = option("float32", "bf16: autocast of the products.")
    threads: int | None = option(
        None, "Threads of torch, the same for a `--resume`; default: all cores.", ge=1, le=1024
    )
    memory_limit: str = option("600MB", "Memory DuckDB may use for the stream, from 32MB on.")
    weight_decay: float = option(0.01, "Weight decay of AdamW in RCE and GRPO.", ge=0)
    gradient_clip: Positive = option(1.0, "Largest norm of the gradient.")
    tied_groups: Literal["skip", "keep", "downweight"] = option(
        "skip", "Groups whose rewards are all equal: skip, keep (legacy) or downweight."
    )
    tied_weight: Share = option(0.1, "Weight of a tied group under downweight.")
    normalize_clamp: float | None = option(
        None, "Z-scored rewards are clamped to ± this; the newest legacy trainer has 3.", gt=0
    )
    select_by: Literal["reward", "accuracy", "expected_reward", "loss"] = option(
        "reward", "Validation metric of the best checkpoint."
    )
    save_every: int = option(200, "Steps between two saves of the state.", ge=1)
    tensorboard: bool = option(False, "Write TensorBoard events too.")
    trackio: bool = option(False, "Log to trackio too: project lever, a run by the folder's name.")

    @field_validator("memory_limit")
    @classmethod
    def _an_amount(cls, text: str) -> str:
        if (found := _AMOUNT.fullmatch(text.strip())) is None:
            raise ValueError("an amount of memory is a number and a unit, such as 600MB or 1.5GB")
        base = 1024 if found[3] else 1000
        if (
            not LEAST_MEMORY
            <= float(found[1]) * base ** (1 + "KMGT".index(found[2].upper()))
            < 2**60
        ):
            raise ValueError("the stream needs 32MB, and there is no more than 1,000,000TB")
        return text


class Source(Section):
    """Where the data is. Without runs: all of the store."""

    store: StorePath = DEFAULT_STORE
    runs: RunNames = ()
    sql_dir: SqlDir = None


class TrainConfig(Section):
    """Everything a training depends on, but the store and where its results go."""

    data: DataConfig = Field(default_factory=DataConfig)
    reward: RewardSpec = Field(default_factory=RewardSpec)
    model: ModelConfig = Field(default_factory=ModelConfig)
    rce: RceConfig = Field(default_factory=RceConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    dense: DenseConfig = Field(default_factory=DenseConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _clamps_something(self) -> Self:
        has_z_scores = self.rce.use_normalized_reward or self.grpo.epochs
        if self.run.normalize_clamp is not None and not has_z_scores:
            raise ValueError(
                "normalize_clamp bounds z-scored rewards, and nothing is z-scored: "
                "give --rce-use-normalized-reward too"
            )
        return self
