"""One cell of a sweep, in a process of its own: train, evaluate, leave ``result.json``.

In goes a :class:`CellTask`, which can be pickled; out come the files of the cell's folder. A cell
that was killed goes on from the state of its training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_data.store.files import write_atomic
from lever_train.flow.pipeline import Outputs
from lever_train.options.pipeline import PipelineConfig


@dataclass(frozen=True)
class CellTask:
    """A cell: its id, what it sets, the whole config, the outputs of the shared steps, and its
    folder."""

    cell: str
    settings: dict[str, Any]
    config: PipelineConfig
    shared: dict[str, Outputs]
    folder: Path

    @property
    def result(self) -> Path:
        """The file that says the cell is finished."""
        return self.folder / "result.json"


def run_cell(task: CellTask) -> None:
    """Train and evaluate one cell.

    Raises:
        LeverError: its options do not fit the data.
    """
    from lever_train.flow.steps_learn import judge
    from lever_train.flow.training import run_training, with_data
    from lever_train.flow.work import Work

    work = Work(task.config, lambda line: None, lambda done, total, note="": None)
    sft = task.shared["sft"].get("checkpoint")
    training = with_data(work, task.shared, task.config.train, sft)
    # cells run side by side: more threads than cores would only wait for each other
    run = training.run.model_copy(update={"threads": 1})
    training = training.model_copy(update={"run": run})
    runs = work.rl_runs(task.shared)
    result = run_training(work, task.folder, training, runs, begun=True)
    checkpoints = {"cell": result.last}
    if sft is not None:
        checkpoints = {"sft": Path(sft), **checkpoints}
    board = judge(work, task.shared, checkpoints).scoreboard
    found = {
        "evaluation": board.run,
        "checkpoint": str(result.last),
        "settings": task.settings,
        "validation": result.epochs[-1].get("val_pick_accuracy"),
    }
    write_atomic(task.result, json.dumps(found, indent=1).encode())
