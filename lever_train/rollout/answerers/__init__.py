"""Answerers: models, endpoints and rules that answer prompts, behind one interface.

:func:`make_answerer` reads a specification such as ``nearest`` or ``openai:http://…/v1``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lever_data.errors import UsageError
from lever_data.items.task import Task
from lever_data.store.pictures import pictures_of
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import Answer, Answerer, Usage

__all__ = [
    "Answer",
    "Answerer",
    "Surroundings",
    "Usage",
    "images_of",
    "make_answerer",
    "needs_images",
]

# the names of the legacy scripts, and where the models live today
LEGACY_MODELS = {
    "qwen2.5_vl_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen2_5-VL-3B-Instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
    "flamingo_3B": "openflamingo/OpenFlamingo-3B-vitl-mpt1b",
}


@dataclass(frozen=True)
class Surroundings:
    """What an answerer may draw on besides the prompts: vectors by item id, the answers of all
    examples, and the task that says how items are shown."""

    query_vectors: npt.NDArray[np.float32] | None = None
    example_vectors: npt.NDArray[np.float32] | None = None
    prior: Iterable[tuple[str, ...]] = field(default_factory=tuple)
    task: Task = field(default_factory=Task)


def needs_images(spec: AnswererSpec, task: Task) -> bool:
    """Whether the answerer looks at images of the task.

    Raises:
        UsageError: no such answerer.
    """
    kind, _ = _parse(spec)
    sees = kind == "transformers" or (kind == "openai" and spec.api == "chat")
    return sees and spec.images and task.images


def images_of(spec: AnswererSpec, task: Task, folder: Path | None, store: Path) -> Path | None:
    """The folder of the images an answerer looks at, the store where it holds them; ``None``
    where it looks at none, whatever folder is named.

    Raises:
        UsageError: it does, and there is no such folder.
    """
    if not needs_images(spec, task):
        return None
    if folder is None and (held := pictures_of(store)) is not None:
        return held
    if folder is None or not folder.is_dir():
        raise UsageError(
            "this answerer looks at images",
            value=None if folder is None else str(folder),
            hint="--image-root DIR names the folder they lie in; --without-images goes without",
        )
    return folder


def make_answerer(spec: AnswererSpec, around: Surroundings) -> Answerer:
    """The answerer a specification names.

    Raises:
        UsageError: no such answerer, or it lacks what it needs.
    """
    kind, rest = _parse(spec)
    if kind == "nearest":
        return _nearest(around)
    if kind == "transformers":
        from lever_train.rollout.answerers.transformers import TransformersAnswerer

        return TransformersAnswerer.load(rest, spec, around.task)
    from lever_train.rollout.answerers.openai import OpenAIAnswerer

    return OpenAIAnswerer.connect(rest, spec, around.task)


def _parse(spec: AnswererSpec) -> tuple[str, str]:
    """The kind of an answerer, and its model or URL; a legacy model name alone will do."""
    kind, _, rest = spec.spec.partition(":")
    if spec.spec in LEGACY_MODELS:
        kind, rest = "transformers", spec.spec
    if kind == "nearest" and not rest:
        return kind, ""
    if kind == "transformers" and rest:
        return kind, LEGACY_MODELS.get(rest, rest)
    if kind == "openai" and rest.startswith(("http://", "https://")):
        return kind, rest
    raise UsageError(
        "unknown answerer",
        value=spec.spec,
        hint="nearest, transformers:NAME (such as transformers:Qwen/Qwen2.5-VL-3B-Instruct) or "
        "openai:URL (such as openai:http://127.0.0.1:8000/v1 with --model NAME)",
    )


def _nearest(around: Surroundings) -> Answerer:
    from lever_train.rollout.answerers.nearest import NearestAnswerer

    if around.query_vectors is None or around.example_vectors is None:
        raise UsageError("the nearest answerer compares embeddings", hint="--query-embeddings F")
    return NearestAnswerer(around.query_vectors, around.example_vectors, around.prior)
