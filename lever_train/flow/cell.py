"""One cell of a sweep, in a process of its own: train, evaluate, leave ``result.json``.

In goes a :class:`CellTask`, which can be pickled; out come the files of the cell's folder. A cell
that was killed goes on from the state of its training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError
from lever_data.store.files import write_atomic
from lever_train.flow.pipeline import Outputs
from lever_train.options.pipeline import PipelineConfig


@dataclass(frozen=True)
class CellTask:
    """A cell: its id, what it sets, the whole config, the outputs of the shared steps, its folder,
    and the views of training questions it is judged on, if any."""

    cell: str
    settings: dict[str, Any]
    config: PipelineConfig
    shared: dict[str, Outputs]
    folder: Path
    judged_on: tuple[str, ...] = ()

    @property
    def result(self) -> Path:
        """The file that says the cell is finished."""
        return self.folder / "result.json"


class CellWorker:
    """An actor that runs cells; every machine sees the store and the folders of the cells."""

    def __init__(self, tasks: Sequence[CellTask]) -> None:
        self.tasks = tasks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with why its cell failed, nothing where it did not."""
        task = self.tasks[int(row["cell"])]
        # asked again where a machine was lost with the reply on it, after the cell was finished
        error = None if task.result.exists() else try_cell(task)
        return {"cell": row["cell"], "error": error or ""}


def try_cell(task: CellTask) -> str | None:
    """Run a cell; what is wrong with its options or data, where something is."""
    try:
        run_cell(task)
    except LeverError as error:
        return error.message()
    return None


def run_cell(task: CellTask) -> None:
    """Train and evaluate one cell; once for every view of training questions it is judged on.

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
    boards, checkpoints, validations = [], [], []
    for view in task.judged_on or (None,):
        folder = task.folder if view is None else task.folder / view
        held_out = training
        if view is not None:
            data = training.data.model_copy(update={"held_out": view})
            held_out = training.model_copy(update={"data": data})
        result = run_training(work, folder, held_out, runs, begun=True)
        named = {"cell": result.last} if sft is None else {"sft": Path(sft), "cell": result.last}
        boards.append(judge(work, task.shared, named, queries=view).scoreboard.run)
        checkpoints.append(str(result.last))
        validations.append(result.epochs[-1].get("val_pick_accuracy"))
    found = {
        "evaluations": boards,
        "checkpoint": checkpoints[0],
        "settings": task.settings,
        "validation": None if task.judged_on else validations[0],
    }
    write_atomic(task.result, json.dumps(found, indent=1).encode())
