"""What the steps of the pipeline share: the config, what earlier steps made, and small helpers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_data.items.scoring import Scoring
from lever_data.store.files import write_atomic
from lever_train.flow.pipeline import Outputs, Say
from lever_train.learn.train import Advance
from lever_train.options.pipeline import PipelineConfig

StepOutputs = Mapping[str, Outputs]


@dataclass(frozen=True)
class Work:
    """What all steps share: the config, and where notices and progress go."""

    config: PipelineConfig
    say: Say
    advance: Advance

    @property
    def out(self) -> Path:
        """The folder of everything that is not in the store."""
        return self.config.data.out

    @property
    def checkpoints(self) -> Path:
        """The folder of the RL checkpoints."""
        return self.config.data.checkpoints or self.out / "rl"

    def embeddings(self, known: StepOutputs) -> tuple[str, str, str | None]:
        """Paths of query, candidate and eval embeddings: given, or made by the step embed."""
        data, made = self.config.data, known.get("embed", {})
        query = str(data.query_embeddings or made.get("query"))
        candidate = str(data.candidate_embeddings or made.get("candidate") or query)
        held_out = data.eval_embeddings or made.get("eval")
        return query, candidate, None if held_out is None else str(held_out)

    def embeds(self, split: str) -> bool:
        """Whether the vectors of a split are made here.

        Those of the eval split are made with those of the train split; beside given ones only for
        a checkpoint that is to be evaluated, which wants them at any rate.
        """
        data = self.config.data
        if split == data.train_split or data.query_embeddings is None:
            return data.query_embeddings is None
        return data.eval_embeddings is None and self.config.eval.checkpoint is not None

    def pools(self, known: StepOutputs) -> tuple[Path | None, Path | None]:
        """Pool files of train and eval queries: given, or made by the step pool."""
        data, made = self.config.data, known.get("pool", {})
        given = (data.pool or made.get("train"), data.eval_pool or made.get("eval"))
        train, held_out = (None if p is None else Path(p) for p in given)
        return train, held_out

    def training_files(self) -> dict[str, Path]:
        """Every given file that a training opens, by what it is."""
        data = self.config.data
        return given(
            query_embeddings=data.query_embeddings,
            candidate_embeddings=data.candidate_embeddings,
            pool=data.pool,
        )

    def rollout_files(self) -> dict[str, Path]:
        """Every given file that a rollout opens: the prompt's words are a file's content."""
        return self.training_files() | given(system_prompt=self.config.answerer.system_prompt)

    def evaluation_files(self) -> dict[str, Path]:
        """Every given file that the evaluation opens; its demonstrations are those of training."""
        data, answerer = self.config.data, self.config.answerer
        return self.rollout_files() | given(
            eval_embeddings=data.eval_embeddings,
            eval_pool=data.eval_pool,
            eval_questions=data.eval_questions,
            eval_annotations=data.eval_annotations,
            checkpoint=self.config.eval.checkpoint,
            query_embeddings_of_the_answerer=answerer.query_embeddings,
            candidate_embeddings_of_the_answerer=answerer.candidate_embeddings,
        )

    def view_files(self) -> dict[str, Path]:
        """The user's own views, in the store and beside it, and features: a changed one changes
        what is read."""
        store = self.config.data.store
        folders = (store / "views", store / "features", self.config.data.sql_dir)
        return {
            f"view {path.stem}": path
            for folder in folders
            if folder is not None
            for path in sorted(folder.glob("*.sql"))
        }

    def task(self) -> dict[str, Any]:
        """The task of the config as parameters of a step, where it has one; a metric of the user's
        own by its name, which holds a digest of its source."""
        task = self.config.given_task
        if task is None:
            return {}
        own = {"metric": Scoring(task).name} if task.metric.startswith("python:") else {}
        return {"task": task.stored(), **own}

    @property
    def has_sft(self) -> bool:
        """Whether an SFT checkpoint is given and there."""
        given_one = self.config.sft.checkpoint
        return given_one is not None and given_one.is_file()

    def beam_runs(self, known: StepOutputs) -> tuple[str, ...]:
        """The runs SFT trains on."""
        searched = known.get("beam", {}).get("run")
        return (*known["ingest"]["beam"], *([searched] if searched else []))

    def rl_runs(self, known: StepOutputs) -> tuple[str, ...]:
        """The runs RL trains on."""
        generated = known.get("generate", {}).get("run")
        return (*known["ingest"]["rl"], *([generated] if generated else []))


def given(**files: Path | None) -> dict[str, Path]:
    """The files that are given, by what they are."""
    return {n.replace("_", " "): path for n, path in files.items() if path is not None}


def save_array(path: Path, values: np.ndarray[Any, Any]) -> str:
    """Write an array as ``.npy``, whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomic(path, buffer.getvalue())
    return str(path)
