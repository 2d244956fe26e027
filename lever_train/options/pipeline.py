"""``lever.toml``: what the pipeline works on and how, one table per step.

In goes a TOML file; out comes a frozen, validated :class:`PipelineConfig`. Paths in it are relative
to the file. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lever_train.options.toml import inside, read_toml, require_fields, validated
from lever_train.options.train import Section, TrainConfig, option


class DataTable(Section):
    """Files and names. ``train`` items are queries and demonstrations, ``eval`` ones queries."""

    store: Path = option(Path("lever-store"), "The store; made where it is not there.")
    out: Path = option(Path("lever-out"), "Folder of checkpoints, pages and `pipeline.json`.")
    checkpoints: Path | None = option(
        None, "Folder of the RL checkpoints; `rl` in `out` if not set."
    )
    dataset: str = Field(description="Name of the dataset in the store.")
    train_split: str = option("train", "Split of the training queries and of all demonstrations.")
    eval_split: str = option("val", "Split of the questions that are evaluated.")
    rl_data: tuple[Path, ...] = option((), "RL data JSON files.")
    beam_data: tuple[Path, ...] = option((), "InfoScore beam JSON files, for SFT.")
    questions: Path | None = option(None, "Official VQA questions of the train split.")
    annotations: Path | None = option(None, "Their official annotations; goes with `questions`.")
    eval_questions: Path | None = option(None, "Official VQA questions of the eval split.")
    eval_annotations: Path | None = option(
        None, "Their official annotations; goes with `eval_questions`."
    )
    query_embeddings: Path | None = option(
        None, "What the selector sees of a train query; row = query id."
    )
    candidate_embeddings: Path | None = option(
        None, "What it sees of a demonstration; if not set, as of a query."
    )
    eval_embeddings: Path | None = option(None, "What it sees of an eval query.")
    pool: Path | None = option(
        None, "`.npy` [n, K] of the train items each train query may be shown."
    )
    eval_pool: Path | None = option(None, "The same for eval queries.")
    image_root: Path | None = option(
        None, "Folder of the images, for `embed` and answerers that see."
    )
    sql_dir: Path | None = option(None, "Folder of views of your own, beside `<store>/views`.")


class EmbedTable(Section):
    """Used where no embeddings are given."""

    encoder: str = option(
        "openai/clip-vit-base-patch32",
        "A CLIP or text encoder: a folder, or a name that transformers knows.",
    )
    features: Literal["text", "image", "both"] = option(
        "both", "What is embedded; `both`: the sum of the two unit vectors."
    )
    batch_size: int = option(64, "Items a batch.", ge=1)


class PoolTable(Section):
    """Pools of the most similar train items, made where none are given."""

    size: int | None = option(None, "Train items in a pool; if not set no pools are made.", ge=1)


class BeamTable(Section):
    """InfoScore beams for SFT, searched where neither they nor a checkpoint are given."""

    queries: int = option(800, "The first so many train queries are searched.", ge=1)
    width: int = option(5, "Beams kept a query.", ge=1)
    shot_num: int = option(2, "Demonstrations in a beam.", ge=1, le=4)


class SftTable(Section):
    """The checkpoint RL starts from: given, or trained on InfoScore beams where it is not there;
    none where it is not ``enabled``."""

    checkpoint: Path | None = option(
        None, "RL starts from this file; where it is not there, from SFT."
    )
    enabled: bool = option(True, "Train an SFT checkpoint where none is given.")
    batch_size: int = option(8, "Queries a step of SFT.", ge=1)


class GenerateTable(Section):
    """RL data by rollout, where none is given; or more of it beside what is given (``also``)."""

    also: bool = option(False, "Generate although `rl_data` is given.")
    queries: int | None = option(None, "Only the first so many train queries.", ge=1)
    shot_num: int = option(2, "Demonstrations in a candidate.", ge=1, le=4)
    num_beams: int = option(5, "Beams of the policy, a query.", ge=0)
    temps: tuple[float, ...] = option((1.0, 1.3), "Sampling temperatures.")
    num_samples_per_temp: int = option(2, "Samples for each temperature.", ge=0)
    num_random: int = option(1, "Random candidates, a query.", ge=0)
    num_retrieval: int = option(0, "Candidates from the ranking by similarity.", ge=0)
    seed: int = option(0, "Seed of samples and random candidates.")


class AnswererTable(Section):
    """Who answers in rollouts and in the evaluation."""

    spec: str = option(
        "nearest", "`nearest`, `transformers:NAME` or `openai:URL` (key: `OPENAI_API_KEY`)."
    )
    model: str | None = option(None, "The endpoint's name of the model.")
    query_embeddings: Path | None = option(
        None, "What `nearest` compares of an eval query, if not what the selector sees."
    )
    candidate_embeddings: Path | None = option(
        None, "What `nearest` compares of a demonstration, likewise."
    )


class AuditTable(Section):
    """The gate before training."""

    fail_on: tuple[str, ...] = option(
        (), 'Gates such as `"fallback_share > 0.1"`: the run stops where one holds.'
    )


class EvalTable(Section):
    """The last table."""

    shots: tuple[int, ...] = option((1, 2, 3, 4), "Numbers of demonstrations to show.")
    limit: tuple[int, ...] = option(
        (), "Score the first so many questions, for each of these numbers; all if empty."
    )
    oracle: Literal["auto", "yes", "no"] = option(
        "auto", "Ask about every demonstration of every pool; `auto`: only with `nearest`."
    )
    seed: int = option(0, "Seed of the random picks.")


class PipelineConfig(Section):
    """Everything ``lever run`` depends on."""

    data: DataTable
    embed: EmbedTable = EmbedTable()
    pool: PoolTable = PoolTable()
    beam: BeamTable = BeamTable()
    sft: SftTable = SftTable()
    generate: GenerateTable = GenerateTable()
    answerer: AnswererTable = AnswererTable()
    audit: AuditTable = AuditTable()
    train: TrainConfig = TrainConfig()
    eval: EvalTable = EvalTable()


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
        return section.model_copy(update=changes)

    names = [n for n in PipelineConfig.model_fields if n != "train"]
    return config.model_copy(update={name: moved(getattr(config, name)) for name in names})
