"""Answers become scores: the metric of a task, built in or the user's own.

In go predictions and the references of each; out come a score in [0, 1] and whether it is right.
What a score depends on besides stands in its name, which every scored row keeps.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lever_data.errors import LeverError, UsageError
from lever_data.items import text_metrics
from lever_data.items.task import VQA, Task, reading_digest
from lever_data.items.vqa_metric import MATCHES_NEEDED, METRIC_VERSION, vqa_accuracy

Scores = npt.NDArray[np.float64]
References = Sequence[Sequence[str]]
Function = Callable[[Sequence[str], References], Any]
_PYTHON = "python:"
# with the version of each: a change of its figures is a new one
_PLAIN: dict[str, tuple[str, Function]] = {
    VQA: (METRIC_VERSION, vqa_accuracy),
    "squad-f1": ("squad-f1-1", text_metrics.squad_f1),
    "label": ("label-2", text_metrics.label_match),
    "rouge-l": ("rouge-l-1", text_metrics.rouge_l),
}
_CIDER = "cider-d"
_CONTRACT = (
    "mend the function, and run the command again: it gets predictions and the references of each, "
    "and returns one float in [0, 1] a prediction, in their order"
)


class Scoring:
    """How the texts of a task become scores.

    Args:
        task: with the metric, and how a text is read.
        corpus: the references of every item of the split, for a metric that asks how rare a word
            is.

    Raises:
        UsageError: there is no such metric.
    """

    def __init__(self, task: Task, corpus: Iterable[Sequence[str]] = ()) -> None:
        self.task = task
        version, self._function = _metric(task.metric, corpus)
        reading = task.reading()
        self.name = f"{version}+{reading}" if reading else version

    def scorer(self, answerer: str) -> str:
        """What rows are marked with: the same answers scored otherwise are another scorer's, so
        that a training never mixes them."""
        return answerer if self.name == METRIC_VERSION else f"{answerer}~{self.name}"

    def reads_as(self, metric_version: str | None) -> bool:
        """Whether texts became answers as here in a row scored under this name; one without a name
        does not say otherwise."""
        if metric_version is None:
            return True
        metric, _, digest = metric_version.partition("+")
        as_usual = Task() if metric.startswith(VQA) else Task(name="qa")
        usual, ours = (reading_digest(t.normalize, t.cut_at) for t in (as_usual, self.task))
        return (digest or usual) == ours

    def score(self, predictions: Sequence[str], references: References) -> Scores:
        """The score of each prediction, float64 [N] in [0, 1].

        Raises:
            LeverError: a metric of the user's own fails, or gives something else.
        """
        if not self.task.metric.startswith(_PYTHON):
            return np.asarray(self._function(predictions, references), np.float64)
        return self._own(predictions, references)

    def is_right(
        self, predictions: Sequence[str], references: References, scores: Scores
    ) -> npt.NDArray[np.bool_]:
        """Whether each prediction is right, bool [N]: an exact match for SQuAD, else a score above
        the task's ``correct_above``. A missing score, NaN, is not right."""
        if self.task.metric == "squad-f1":
            return np.asarray(text_metrics.squad_exact(predictions, references)) > 0
        found: npt.NDArray[np.bool_] = scores > self.task.correct_above
        return found

    def worth(self, given: Sequence[str], references: Sequence[str]) -> list[float]:
        """What it is worth to say each of ``given``: of the VQA accuracy min(n / 3, 1) for the n
        annotators who did, else the score."""
        if self.task.metric == VQA:
            counts = Counter(references)
            return [min(counts[said] / MATCHES_NEEDED, 1.0) for said in given]
        found: list[float] = self.score(given, [references] * len(given)).tolist()
        return found

    def _own(self, predictions: Sequence[str], references: References) -> Scores:
        metric = self.task.metric
        try:
            found = np.asarray(self._function(list(predictions), [list(r) for r in references]))
            scores = found.astype(np.float64)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise LeverError(f"the metric failed ({said})", where=metric, hint=_CONTRACT) from error
        if scores.shape != (len(predictions),):
            raise LeverError(
                "the metric does not give one number a prediction",
                where=metric,
                value=f"{scores.shape} for {len(predictions):,} predictions",
                hint=_CONTRACT,
            )
        for said, score in zip(predictions, scores.tolist(), strict=True):
            if not (math.isfinite(score) and 0 <= score <= 1):
                raise LeverError(
                    "the metric gives a score outside [0, 1]",
                    where=metric,
                    value=f"{score} for the prediction {said!r}",
                    hint=_CONTRACT,
                )
        return scores


def _metric(name: str, corpus: Iterable[Sequence[str]]) -> tuple[str, Function]:
    """The name a score by this metric has, and the metric."""
    if name in _PLAIN:
        return _PLAIN[name]
    if name == _CIDER:
        known = [tuple(references) for references in corpus]
        digest = hashlib.sha256(repr(known).encode()).hexdigest()[:8]
        return f"cider-d-1@{digest}", text_metrics.CiderD(known)
    if name.startswith(_PYTHON):
        return _own_metric(name)
    raise UsageError(
        "there is no such metric",
        value=name,
        hint=f"{', '.join([*_PLAIN, _CIDER])}, or python:module.function",
    )


def _own_metric(name: str) -> tuple[str, Function]:
    """``python:module.function``, its module from the current folder or wherever Python finds it;
    the digest of their texts, its own and those it imports from its folder, is in its name."""
    module_name, _, function_name = name.removeprefix(_PYTHON).rpartition(".")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module, texts = _module(module_name)
        function: Function = getattr(module, function_name)
    except Exception as error:  # whatever a module does when it is imported
        raise UsageError(
            f"the metric cannot be loaded ({type(error).__name__}: {error})",
            value=name,
            hint="python:module.function, the module in the current folder or installed",
        ) from error
    finally:
        sys.path.remove(here)
    return f"{name}@{hashlib.sha256(texts).hexdigest()[:8]}", function


def _module(name: str) -> tuple[ModuleType, bytes]:
    """A module as its file is now, and the texts it is made of: its own, or those of all modules of
    its folder that its import loads, by name."""
    parent = name.rpartition(".")[0]
    path = importlib.import_module(parent).__path__ if parent else None
    importlib.invalidate_caches()
    spec = PathFinder.find_spec(name, path)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        module = importlib.import_module(name)
        return module, Path(str(module.__file__)).read_bytes()
    finder = _Beside(Path(spec.origin))
    before = {n: m for n, m in sys.modules.items() if finder.is_ours(n, m)}
    for known in before:
        del sys.modules[known]
    sys.meta_path.insert(0, finder)
    try:
        module = importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update((n, m) for n, m in before.items() if not _is_fresh(m))
    texts = [finder.texts[n] for n in sorted(finder.texts)]
    if len(texts) == 1:
        return module, texts[0]
    return module, b"".join(hashlib.sha256(text).digest() for text in texts)


class _Beside(MetaPathFinder):
    """Finds a module and those of its folder as their files are now: what ``import`` remembers, in
    this process and in ``__pycache__``, may be of another text or of another folder."""

    def __init__(self, file: Path) -> None:
        # beside an installed module of one file lie those of others
        self._is_alone = file.parent.name in ("site-packages", "dist-packages")
        self._file = file
        self.texts: dict[str, bytes] = {}

    def is_ours(self, name: str, module: ModuleType) -> bool:
        """Whether a module that is loaded may be another than its file."""
        file = getattr(module, "__file__", None)
        return _is_fresh(module) or (file is not None and self._is_beside(Path(file)))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or not self._is_beside(Path(spec.origin)):
            return None
        self.texts[fullname] = Path(spec.origin).read_bytes()
        spec.loader = _Fresh(fullname, spec.origin)
        return spec

    def _is_beside(self, file: Path) -> bool:
        if file.suffix != ".py":
            return False
        return file == self._file if self._is_alone else file.parent == self._file.parent


class _Fresh(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _is_fresh(module: ModuleType) -> bool:
    return isinstance(getattr(module, "__loader__", None), _Fresh)
