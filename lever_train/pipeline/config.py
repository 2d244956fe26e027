"""``lever.toml``: what the pipeline works on and how, one table per step.

In goes a TOML file; out comes a frozen, validated :class:`PipelineConfig`. Paths in it are relative
to the file. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from lever_data.errors import UsageError
from lever_train.config import Section, TrainConfig


class DataTable(Section):
    """Files and names. ``train`` items are queries and demonstrations, ``eval`` ones queries.

    ``checkpoints``: the folder of the RL checkpoints, ``<out>/rl`` where it is not set.
    """

    store: Path = Path("lever-store")
    out: Path = Path("lever-out")
    checkpoints: Path | None = None
    dataset: str
    train_split: str = "train"
    eval_split: str = "val"
    rl_data: tuple[Path, ...] = ()
    beam_data: tuple[Path, ...] = ()
    questions: Path | None = None
    annotations: Path | None = None
    eval_questions: Path | None = None
    eval_annotations: Path | None = None
    query_embeddings: Path | None = None
    candidate_embeddings: Path | None = None
    eval_embeddings: Path | None = None
    pool: Path | None = None
    eval_pool: Path | None = None
    image_root: Path | None = None
    sql_dir: Path | None = None  # a folder of your own views, beside <store>/views


class EmbedTable(Section):
    """Used where no embeddings are given."""

    encoder: str = "openai/clip-vit-base-patch32"
    features: Literal["text", "image", "both"] = "both"
    batch_size: int = Field(default=64, ge=1)


class PoolTable(Section):
    """Pools of the most similar train items, made where none are given."""

    size: int | None = Field(default=None, ge=1)


class BeamTable(Section):
    """InfoScore beams for SFT, searched where neither they nor a checkpoint are given."""

    queries: int = Field(default=800, ge=1)
    width: int = Field(default=5, ge=1)
    shot_num: int = Field(default=2, ge=1, le=4)


class SftTable(Section):
    """The checkpoint RL starts from: given, or trained on InfoScore beams where it is not there;
    none where it is not ``enabled``."""

    checkpoint: Path | None = None
    enabled: bool = True
    batch_size: int = Field(default=8, ge=1)


class GenerateTable(Section):
    """RL data by rollout, where none is given; or more of it beside what is given (``also``)."""

    also: bool = False
    queries: int | None = Field(default=None, ge=1)
    shot_num: int = Field(default=2, ge=1, le=4)
    num_beams: int = Field(default=5, ge=0)
    temps: tuple[float, ...] = (1.0, 1.3)
    num_samples_per_temp: int = Field(default=2, ge=0)
    num_random: int = Field(default=1, ge=0)
    num_retrieval: int = Field(default=0, ge=0)
    seed: int = 0


class AnswererTable(Section):
    """Who answers in rollouts and in the evaluation."""

    spec: str = "nearest"
    model: str | None = None
    query_embeddings: Path | None = None  # what `nearest` sees of an evaluated query …
    candidate_embeddings: Path | None = None  # … and of a demonstration


class AuditTable(Section):
    """The gate before training."""

    fail_on: tuple[str, ...] = ()


class EvalTable(Section):
    """The last table."""

    shots: tuple[int, ...] = (1, 2, 3, 4)
    limit: tuple[int, ...] = ()
    oracle: Literal["auto", "yes", "no"] = "auto"
    seed: int = 0


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
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"the config cannot be read ({error.strerror})", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the config is not TOML ({error})", where=str(path)) from None
    return relative_to(checked(PipelineConfig, tables, str(path)), path.absolute().parent)


def checked(model: type[PipelineConfig], tables: Mapping[str, Any], where: str) -> PipelineConfig:
    """The config of parsed TOML tables.

    Raises:
        UsageError: an unknown key with the nearest known one, or a value that is not allowed.
    """
    for table, key, hint in unknown_keys(model, tables):
        raise UsageError("unknown key in the config", where=where + table, value=key, hint=hint)
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"the config is not allowed: {first['msg'].removeprefix('Value error, ')}",
            where=f"{where}: {place}",
            value=first["input"] if not isinstance(first["input"], dict) else None,
        ) from None


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


def unknown_keys(
    model: type[BaseModel], tables: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Keys that the model has no field for: the table they stand in, the key, and a hint."""
    known = list(model.model_fields)
    for key, value in tables.items():
        field = model.model_fields.get(key)
        if field is None:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
            yield path, key, hint
        elif isinstance(value, dict) and isinstance(field.annotation, type):
            yield from unknown_keys(field.annotation, value, f"{path}: [{key}]")
