"""What a legacy call finds beside its results: questions, images, models.

In go the folder the call is made in and the words; out come files and models, ``None`` where there
are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_data.store.store import Store

# as their publishers call them, and as the notes do
_QUESTIONS = ("*OpenEnded_mscoco_{split}2014_questions.json*", "{split}_questions.json*")
_ANNOTATIONS = ("*mscoco_{split}2014_annotations.json*", "{split}_annotations.json*")


@dataclass(frozen=True)
class LegacyFiles:
    """The folder ``data`` of a legacy call, for the dataset as it is called and as it was said."""

    root: Path
    names: tuple[str, ...]

    @property
    def folders(self) -> list[Path]:
        """``data/okvqa`` and ``data/okvqa_local``."""
        return [self.root / "data" / name for name in dict.fromkeys(self.names)]

    def questions(self, split: str) -> tuple[Path | None, Path | None]:
        """Questions and annotations of a split; none of them where either is missing."""
        asked, noted = self._first(_QUESTIONS, split), self._first(_ANNOTATIONS, split)
        return (None, None) if asked is None or noted is None else (asked, noted)

    def image_root(self) -> Path | None:
        """The folder that holds ``train2014``."""
        places = [*self.folders, *(self.root / "data" / name for name in ("mscoco", "coco"))]
        found = (
            path.parent
            for place in places
            for pattern in ("train2014", "*/train2014")
            for path in sorted(place.glob(pattern))
            if path.is_dir()
        )
        return next(found, None)

    def _first(self, patterns: Sequence[str], split: str) -> Path | None:
        return next(self._matches(patterns, split), None)

    def _matches(self, patterns: Sequence[str], split: str) -> Iterator[Path]:
        for folder in self.folders:
            for pattern in patterns:
                for below in ("", "*/"):
                    yield from sorted(folder.glob(below + pattern.format(split=split)))


def has_examples(store: Path, dataset: str, split: str) -> bool:
    """Whether the store holds the questions of a split."""
    if not Store.exists(store):
        return False
    place = ("examples", dataset, split)
    return any((run.kind, run.dataset, run.split) == place for run in Store.open(store).runs())


def sees_images(model: str) -> bool | None:
    """Whether a model that is on this machine takes images; ``None``: it is not here.

    Args:
        model: a folder, or a name whose files transformers has fetched before.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):
        return None
    return hasattr(found, "vision_config")
