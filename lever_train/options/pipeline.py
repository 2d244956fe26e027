"""``lever.toml``: what the pipeline works on and how, one table per step.

In goes a TOML file; out comes a frozen, validated :class:`PipelineConfig`. Paths in it are relative
to the file. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from lever_data.errors import UsageError
from lever_data.items.task import Task
from lever_data.options import Section, option
from lever_data.sources.ingest_options import Columns, Order, Reader
from lever_data.toml import inside, read_toml, require_fields, validated
from lever_data.vocabulary import (
    DEFAULT_STORE,
    Annotations,
    Gates,
    ImageName,
    ImageRoot,
    Limit,
    Pool,
    Questions,
    SqlDir,
    StorePath,
)
from lever_train.options.embed import Encoding
from lever_train.options.evaluate import Figures
from lever_train.options.rollout import AnswererSpec, BeamShape, Recipe, ShotNum
from lever_train.options.train import TrainConfig


class DataTable(Section):
    """Files and names. ``train`` items are queries and demonstrations, ``eval`` ones queries."""

    store: StorePath = DEFAULT_STORE
    out: Path = option(Path("lever-out"), "Folder of checkpoints, pages and `pipeline.json`.")
    checkpoints: Path | None = option(
        None, "Folder of the RL checkpoints; `rl` in `out` if not set."
    )
    dataset: str = option(..., "Name of the dataset in the store.")
    train_split: str = option("train", "Split of the training queries and of all demonstrations.")
    eval_split: str = option("val", "Split of the questions that are evaluated.")
    rl_data: tuple[Path, ...] = option((), "RL data JSON files.")
    beam_data: tuple[Path, ...] = option((), "InfoScore beam JSON files, for SFT.")
    rl_out: Path | None = option(None, "Generated RL data is written here, too, as legacy JSON.")
    rl_reader: Reader = option("newest", "State of the legacy code that file is written for.")
    order: Order = option(
        "file",
        "What numbers questions: their place in the file, or that among the sorted question ids, "
        "as in all legacy data.",
    )
    items: Path | None = option(
        None, "A data set of the train split in place of questions and annotations."
    )
    eval_items: Path | None = option(None, "One of the eval split.")
    questions: Questions = None
    annotations: Annotations = None
    eval_questions: Questions = None
    eval_annotations: Annotations = None
    texts: dict[str, Path] = option(
        {}, "JSON lists of texts of the train items by name, such as the words of their pictures."
    )
    eval_texts: dict[str, Path] = option({}, "Those of the eval items.")
    query_embeddings: Path | None = option(
        None, "What the selector sees of a train query; row = query id."
    )
    candidate_embeddings: Path | None = option(
        None, "What it sees of a demonstration; if not set, as of a query."
    )
    eval_embeddings: Path | None = option(None, "What it sees of an eval query.")
    cache: Path | None = option(
        None, "Folder of embeddings made of the train split; `cache/train` in `out` if not set."
    )
    pool: Pool = None
    eval_pool: Pool = None
    image_root: ImageRoot = None
    image_name: ImageName = None
    sql_dir: SqlDir = None


class EmbedTable(Encoding):
    """Vectors of the items: of what ``features`` says, or of one space a template."""

    templates: dict[str, str] = option(
        {},
        "A vector space by name and what is read of an item in it: words with {question}, {answer} "
        "and the {NAME} of texts; those with {answer} are of train items alone.",
    )
    compared: tuple[str, ...] = option(
        (), "The spaces that stand side by side as what the selector sees of an item."
    )

    @model_validator(mode="after")
    def _compares_templates(self) -> Self:
        if (self.templates and not self.compared) or not {*self.compared} <= {*self.templates}:
            raise ValueError("compared names spaces of templates, at least one where there are any")
        for name in self.compared:
            if "{answer}" in self.templates[name]:
                raise ValueError(f"the space {name} reads answers, which a query has none of")
        return self

    @property
    def encoding(self) -> dict[str, Any]:
        """What every space is embedded with."""
        return self.model_dump(include=set(Encoding.model_fields))


class PoolTable(Section):
    """Pools of the most similar train items, made where none are given."""

    size: int | None = option(None, "Train items in a pool; if not set no pools are made.", ge=1)


class BeamTable(BeamShape):
    """InfoScore beams for SFT, searched where neither they nor a checkpoint are given."""

    limit: Limit = 800
    shot_num: ShotNum = 2


class SftTable(Section):
    """The checkpoint RL starts from: given, or trained on InfoScore beams where it is not there;
    none where it is not ``enabled``."""

    checkpoint: Path | None = option(
        None, "RL starts from this file; where it is not there, from SFT."
    )
    enabled: bool = option(True, "Train an SFT checkpoint where none is given.")
    batch_size: int = option(8, "Queries per step of SFT.", ge=1)


class GenerateTable(Recipe):
    """RL data by rollout, where none is given; or more of it beside what is given (``also``)."""

    also: bool = option(False, "Generate although `rl_data` is given.")
    limit: Limit = None
    shot_num: ShotNum = 2


class AnswererTable(AnswererSpec):
    """Who answers in rollouts and in the evaluation."""

    query_embeddings: Path | None = option(
        None, "What `nearest` compares of an eval query, if not what the selector sees."
    )
    candidate_embeddings: Path | None = option(
        None, "What `nearest` compares of a demonstration, likewise."
    )

    @property
    def answerer(self) -> AnswererSpec:
        """Who answers, without the files that only the evaluation gives it."""
        return AnswererSpec(**self.model_dump(include=set(AnswererSpec.model_fields)))


class RoundsTable(Section):
    """Rollout, training and a judgement, again and again: each round asks where the last one may
    still learn, and the rounds end where one adds nothing."""

    count: int = option(0, "Rounds at most; 0: one rollout and one training.", ge=0, le=100)
    budget: int | None = option(
        None, "Answers in all rounds together; what the first leaves is shared by the others.", ge=1
    )
    p: float = option(
        0.05, "A round that gains less than chance would, at this level, is the last.", gt=0, lt=1
    )

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.count > 1 and self.budget is None:
            raise UsageError("rounds need a budget of answers", hint="[rounds] budget = N")
        return self


class AuditTable(Section):
    """The gate before training."""

    fail_on: Gates = ()


class EvalTable(Figures):
    """What is evaluated: what was trained, or a checkpoint that is there; then nothing is trained
    and nothing generated."""

    checkpoint: Path | None = option(None, "Evaluate this selector, and train none.")
    predictions: Path | None = option(
        None, "Folder for the answers as official results files, one a selector and shot number."
    )

    @property
    def figures(self) -> Figures:
        """What is measured."""
        return Figures(**self.model_dump(include=set(Figures.model_fields)))


class PipelineConfig(Section):
    """Everything ``lever run`` depends on."""

    data: DataTable
    columns: Columns = Field(default_factory=Columns)
    task: Task = Field(default_factory=Task)
    embed: EmbedTable = Field(default_factory=EmbedTable)
    pool: PoolTable = Field(default_factory=PoolTable)
    beam: BeamTable = Field(default_factory=BeamTable)
    sft: SftTable = Field(default_factory=SftTable)
    generate: GenerateTable = Field(default_factory=GenerateTable)
    rounds: RoundsTable = Field(default_factory=RoundsTable)
    answerer: AnswererTable = Field(default_factory=AnswererTable)
    audit: AuditTable = Field(default_factory=AuditTable)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalTable = Field(default_factory=EvalTable)

    @property
    def given_task(self) -> Task | None:
        """The table ``[task]``, where the file has one: else it is as ingested."""
        return self.task if self.task.model_fields_set else None


def load_pipeline(path: Path) -> PipelineConfig:
    """Read a ``lever.toml``.

    Raises:
        UsageError: the file cannot be read, or a key or value is not allowed.
    """
    tables = read_toml(path, "the config")
    require_fields(PipelineConfig, tables, "the config", str(path))
    config = validated(PipelineConfig, tables, "the config", inside(str(path)))
    return relative_to(config, path.absolute().parent)


def relative_to(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """The config with every path made absolute, seen from ``folder``."""

    def moved(section: Section) -> Section:
        changes: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Path):
                changes[name] = folder / value.expanduser()
            elif isinstance(value, tuple) and value and isinstance(value[0], Path):
                changes[name] = tuple(folder / item.expanduser() for item in value)
            elif name in ("texts", "eval_texts"):
                changes[name] = {key: folder / path.expanduser() for key, path in value.items()}
        return section.model_copy(update=changes)

    names = [n for n in PipelineConfig.model_fields if n != "train"]
    return config.model_copy(update={name: moved(getattr(config, name)) for name in names})
