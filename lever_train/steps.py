"""The steps of the pipeline: what each does, what it depends on, and when there is nothing to do.

In goes a :class:`PipelineConfig`; out come :class:`Step` records in order: ingest, embed, pool,
beam, sft, generate, audit, train, convert, evaluate. Each calls the library verb of its command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_data.errors import UsageError
from lever_data.ingest import IngestOptions, ingest
from lever_data.store import Store
from lever_train.pipeline import Outputs, Say, Step
from lever_train.pipeline_config import PipelineConfig
from lever_train.train import Advance

Known = Mapping[str, Outputs]


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

    def embeddings(self, known: Known) -> tuple[str, str, str | None]:
        """Paths of query, candidate and eval embeddings: given, or made by the step embed."""
        data, made = self.config.data, known.get("embed", {})
        query = str(data.query_embeddings or made.get("query"))
        candidate = str(data.candidate_embeddings or made.get("candidate") or query)
        held_out = data.eval_embeddings or made.get("eval")
        return query, candidate, None if held_out is None else str(held_out)

    def pools(self, known: Known) -> tuple[str | None, str | None]:
        """Pool files of train and eval queries: given, or made by the step pool."""
        data, made = self.config.data, known.get("pool", {})
        given = (data.pool or made.get("train"), data.eval_pool or made.get("eval"))
        train, held_out = (None if p is None else str(p) for p in given)
        return train, held_out

    @property
    def has_sft(self) -> bool:
        """Whether an SFT checkpoint is given and there."""
        given_one = self.config.sft.checkpoint
        return given_one is not None and given_one.is_file()

    def beam_runs(self, known: Known) -> tuple[str, ...]:
        """The runs SFT trains on."""
        searched = known.get("beam", {}).get("run")
        return (*known["ingest"]["beam"], *([searched] if searched else []))

    def rl_runs(self, known: Known) -> tuple[str, ...]:
        """The runs RL trains on."""
        generated = known.get("generate", {}).get("run")
        return (*known["ingest"]["rl"], *([generated] if generated else []))


def build_steps(config: PipelineConfig, say: Say, advance: Advance) -> list[Step]:
    """The steps of a config.

    Raises:
        UsageError: there is neither RL data nor what is needed to generate it.
    """
    from lever_train import steps_learn, steps_make

    work = Work(config, say, advance)
    return [
        _ingest(work),
        steps_make.embed(work),
        steps_make.pool(work),
        steps_make.beam(work),
        steps_learn.sft(work),
        steps_make.generate(work),
        steps_learn.audit(work),
        steps_learn.train(work),
        steps_learn.convert(work),
        steps_learn.evaluate(work),
    ]


def _ingest(work: Work) -> Step:
    data = work.config.data
    reads = {f"RL data {i + 1}": p for i, p in enumerate(data.rl_data)}
    reads |= {f"beam data {i + 1}": p for i, p in enumerate(data.beam_data)}
    reads |= {
        name: path
        for name, path in (
            ("questions", data.questions),
            ("annotations", data.annotations),
            ("eval questions", data.eval_questions),
            ("eval annotations", data.eval_annotations),
        )
        if path is not None
    }

    def act(known: Known, begun: bool) -> Outputs:
        store = Store.create(data.store)
        found = _ingest_split(
            work,
            store,
            data.train_split,
            (*data.rl_data, *data.beam_data, *_both(data.questions, data.annotations)),
        )
        if data.eval_split != data.train_split:
            files = _both(data.eval_questions, data.eval_annotations)
            found += _ingest_split(work, store, data.eval_split, files)
        return {
            "rl": [run for kind, run in found if kind == "rl_data"],
            "beam": [run for kind, run in found if kind == "beam"],
            "examples": [run for kind, run in found if kind == "examples"],
            "paths": [str(store.run(run).path) for _, run in found],
        }

    parameters = {
        "store": str(data.store),
        "dataset": data.dataset,
        "splits": [data.train_split, data.eval_split],
    }
    return Step("ingest", act, parameters, reads)


def _ingest_split(
    work: Work, store: Store, split: str, files: tuple[Path, ...]
) -> list[tuple[str, str]]:
    """(kind, run id) of every file; embeddings and pools are read where they lie."""
    options = IngestOptions(work.config.data.dataset, split, notice=work.say)
    return [(done.run.kind, done.run.run) for done in ingest(files, store, options)]


def _both(questions: Path | None, annotations: Path | None) -> tuple[Path, ...]:
    if (questions is None) != (annotations is None):
        raise UsageError("questions and annotations belong together: give both or neither")
    return () if questions is None or annotations is None else (questions, annotations)


def given(**files: Path | None) -> dict[str, Path]:
    """The files that are given, by what they are."""
    return {n.replace("_", " "): path for n, path in files.items() if path is not None}


def save_array(path: Path, values: np.ndarray[Any, Any]) -> str:
    """Write an array as ``.npy``, whole or not at all; returns the path."""
    import io

    from lever_data.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomic(path, buffer.getvalue())
    return str(path)
