"""``sweep``: train and judge every cell of a grid, in parallel processes, each only once.

In go a :class:`SweepConfig` and a number of processes; out comes a :class:`SweepReport`, and a run
of kind ``sweep`` with one row a cell. A finished cell leaves ``result.json`` in its folder, written
whole; a sweep that was killed goes on with the cells that have none. The folder is named by the key
the pipeline would give the cell's evaluation: where what it depends on changes, so does the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.report.statistics import bootstrap_mean
from lever_data.store.files import write_atomic
from lever_data.store.schema import SWEEPS
from lever_data.store.store import RunSpec, Store
from lever_train.flow.cell import CellTask, run_cell
from lever_train.flow.pipeline import Outputs, Pipeline, Say, Step
from lever_train.flow.steps import build_steps
from lever_train.flow.training import keyed
from lever_train.options.pipeline import PipelineConfig, load_pipeline
from lever_train.options.sweep import Settings, SweepConfig, cell_config

SHARED = ("ingest", "embed", "pool", "beam", "sft", "generate")  # steps all cells have in common
OWN = ("train", "evaluate")
REPLICATES = 1000
Progress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Cell:
    """A finished cell: ``accuracy`` in [0, 1], mean over queries and shot numbers, with its 95 %
    interval; ``difference`` to the SFT model where there is one, paired by query."""

    cell: str
    settings: Settings
    accuracy: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    num_queries: int
    evaluation: str
    checkpoint: str


@dataclass(frozen=True)
class SweepReport:
    """All cells, best first. ``luck``: by how much the best of as many equally good cells would
    lead their mean by chance alone, on the same queries."""

    name: str
    cells: tuple[Cell, ...]
    luck: float
    run: str
    failed: tuple[tuple[Settings, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def sweep(
    config: SweepConfig, jobs: int, say: Say = lambda line: None, progress: Progress | None = None
) -> SweepReport:
    """Run what is missing of a sweep and report on all of it.

    Raises:
        UsageError: no process to run in, or two cells are the same.
        LeverError: the shared steps failed, or every cell did.
    """
    if jobs < 1:
        raise UsageError("--jobs must be above 0", value=jobs)
    base = load_pipeline(Path(config.base))
    _require_distinct(config, base)  # before the shared steps, which may take hours
    pipeline = _shared(base, say)
    shared = pipeline.run(say)  # once for all cells
    tasks = [_task(config, base, pipeline, shared, chosen) for chosen in config.settings()]
    failed = _run_missing(tasks, jobs, say, progress)
    done = [task for task in tasks if task.result.exists()]
    if not done:
        raise LeverError("every cell of the sweep failed", value=failed[0][1])
    return _report(config, base, done, failed)


def _shared(base: PipelineConfig, say: Say) -> Pipeline:
    """The steps before training."""
    return Pipeline(base.data.out, [s for s in _steps(base, say) if s.name in SHARED])


def _steps(config: PipelineConfig, say: Say = lambda line: None) -> list[Step]:
    return build_steps(config, say, lambda done, total, note="": None)


def _task(
    config: SweepConfig,
    base: PipelineConfig,
    pipeline: Pipeline,
    shared: Mapping[str, Outputs],
    settings: Settings,
) -> CellTask:
    """A cell, named by all that its figures depend on.

    Args:
        pipeline: the shared steps, planned.
        shared: their outputs.

    Raises:
        LeverError: a file that is given is not there.
    """
    training = cell_config(base.train, config, settings, config.name)
    whole = base.model_copy(update={"train": training})
    cell = pipeline.key_after(_own_steps(whole))[:12]
    return CellTask(cell, settings, whole, dict(shared), config.out / config.name / cell)


def _own_steps(config: PipelineConfig) -> list[Step]:
    """What a cell does of its own: it trains and is evaluated; no gate asks for its audit."""
    own = [step for step in _steps(config) if step.name in OWN]
    return [replace(s, after=tuple(n for n in s.after if n != "audit")) for s in own]


def _require_distinct(config: SweepConfig, base: PipelineConfig) -> None:
    """Two processes would train in one folder, and a report would count one cell twice.

    Raises:
        UsageError: two cells differ in nothing that changes a result.
    """
    seen: dict[str, Settings] = {}
    for settings in config.settings():
        training = cell_config(base.train, config, settings, config.name)
        known = json.dumps(keyed(training), sort_keys=True)
        if known in seen:
            raise UsageError(
                "two cells of the sweep are the same",
                value=f"{json.dumps(seen[known])} and {json.dumps(settings)}",
                hint="leave one out; options such as run.threads change no cell",
            )
        seen[known] = settings


def _run_missing(
    tasks: Sequence[CellTask], jobs: int, say: Say, progress: Progress | None
) -> list[tuple[Settings, str]]:
    """Run the cells without a result; the settings and errors of those that failed."""
    waiting = [task for task in tasks if not task.result.exists()]
    if len(waiting) < len(tasks):
        say(f"{len(tasks) - len(waiting)} of {len(tasks)} cells are finished already")
    failed: list[tuple[Settings, str]] = []
    for number, (task, error) in enumerate(_each(waiting, jobs), len(tasks) - len(waiting) + 1):
        if error is not None:
            failed.append((task.settings, error.message()))
            say(f"cell {task.cell} failed: {error.message()}")
        if progress is not None:
            progress(number, len(tasks), json.dumps(task.settings))
    return failed


def _each(tasks: Sequence[CellTask], jobs: int) -> Iterator[tuple[CellTask, LeverError | None]]:
    """Run cells, yielding each as it ends; what is no fault of the data is raised."""
    if jobs == 1:
        for task in tasks:
            yield task, _try(task)
        return
    # spawn: a forked child would share torch's threads and DuckDB's connections
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_try, task): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()


def _try(task: CellTask) -> LeverError | None:
    try:
        run_cell(task)
    except LeverError as error:
        return error
    return None


def _report(
    config: SweepConfig,
    base: PipelineConfig,
    done: Sequence[CellTask],
    failed: Sequence[tuple[Settings, str]],
) -> SweepReport:
    scores, cells = [], []
    con = connect(base.data.store)
    for task in done:
        result = json.loads(task.result.read_bytes())
        own = _per_query(con, result["evaluation"], "cell")
        scores.append(own)
        cells.append(_cell(task, result, own, _per_query(con, result["evaluation"], "sft")))
    run = _commit(config, base, cells)
    report = SweepReport(
        config.name,
        tuple(sorted(cells, key=lambda cell: -cell.accuracy)),
        _luck(np.stack(scores, axis=1)),
        run,
        tuple(failed),
    )
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    write_atomic(config.out / config.name / "report.json", text.encode())
    return report


def _per_query(con: duckdb.DuckDBPyConnection, run: str, selector: str) -> np.ndarray:
    """Mean accuracy of each query over the shot numbers, [n] float64; empty without the selector.

    A failed answer counts as 0 here, so that all cells are judged on the same queries.
    """
    rows = con.cursor().execute(
        "select avg(coalesce(accuracy, 0)) as mean from evaluations "
        "where run = ? and selector = ? group by query_id order by query_id",
        [run, selector],
    )
    return np.array([row[0] for row in rows.fetchall()], dtype=np.float64)


def _cell(
    task: CellTask, result: Mapping[str, str], own: np.ndarray, reference: np.ndarray
) -> Cell:
    found = bootstrap_mean(own)
    change = bootstrap_mean(own - reference) if len(reference) else None
    return Cell(
        cell=task.cell,
        settings=task.settings,
        accuracy=found.mean,
        low=found.low,
        high=found.high,
        difference=None if change is None else change.mean,
        difference_low=None if change is None else change.low,
        difference_high=None if change is None else change.high,
        num_queries=len(own),
        evaluation=result["evaluation"],
        checkpoint=result["checkpoint"],
    )


def _luck(scores: np.ndarray) -> float:
    """Mean lead of the best cell over the mean cell, were all equally good; bootstrap over queries.

    Args:
        scores: [n, cells] accuracies; each cell's mean is taken out first.
    """
    level = scores - scores.mean(0)
    n = len(level)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=REPLICATES) / n
    means = weights @ level
    return float((means.max(1) - means.mean(1)).mean())


def _commit(config: SweepConfig, base: PipelineConfig, cells: Sequence[Cell]) -> str:
    """The run of kind ``sweep`` with one row a cell; returns its id."""
    rows = [
        {**asdict(cell), "sweep": config.name, "settings": json.dumps(cell.settings)}
        for cell in cells
    ]
    spec = RunSpec(
        kind="sweep",
        dataset=base.data.dataset,
        split=base.data.eval_split,
        source_sha256=hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        parameters={"name": config.name},
    )
    store = Store.open(base.data.store)
    if store.find(spec) is None:
        with store.begin(spec) as writer:
            writer.write("sweeps", pa.Table.from_pylist(rows, SWEEPS))
            writer.commit()
    return spec.run_id()
