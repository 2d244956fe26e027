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
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.relations.rewards import reward_sql
from lever_data.report.statistics import bootstrap_mean, chance_lead
from lever_data.store.files import write_atomic
from lever_data.store.schema import SWEEPS
from lever_data.store.store import Run, RunSpec, Store
from lever_train.flow.cell import CellTask, CellWorker, try_cell
from lever_train.flow.pipeline import Outputs, Pipeline, Say, Step
from lever_train.flow.steps import build_steps
from lever_train.flow.sweep_page import Cell, SweepReport, sweep_page
from lever_train.flow.training import keyed
from lever_train.inputs.actors import spread
from lever_train.options.engine import Engine
from lever_train.options.pipeline import PipelineConfig, load_pipeline
from lever_train.options.sweep import Settings, SweepConfig, cell_config, judged_base
from lever_train.options.train import TrainConfig

SHARED = ("ingest", "embed", "pool", "beam", "sft", "generate")  # steps all cells have in common
OWN = ("train", "evaluate")
PAGE = "sweep.html"  # beside report.json
Progress = Callable[[float, float | None, str], None]


def sweep(
    config: SweepConfig,
    jobs: int,
    say: Say = lambda line: None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> SweepReport:
    """Run what is missing of a sweep and report on all of it.

    Raises:
        UsageError: no process to run in, or two cells are the same.
        LeverError: the shared steps failed, or every cell did.
    """
    if jobs < 1:
        raise UsageError("--jobs must be above 0", value=jobs)
    base = judged_base(load_pipeline(Path(config.base)), config, config.name)
    if config.judged_on and (base.sft.enabled or base.sft.checkpoint is not None):
        raise UsageError(
            "the SFT model has learnt from the questions that cells are judged on",
            where=config.base,
            hint="[sft] enabled = false, or leave judged_on out",
        )
    _require_distinct(config, base)  # before the shared steps, which may take hours
    pipeline = _shared(base, say)
    shared = pipeline.run(say)  # once for all cells
    tasks = [_task(config, base, pipeline, shared, chosen) for chosen in config.settings()]
    failed = _run_missing(tasks, jobs, engine or Engine(), say, progress)
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
    key = pipeline.key_after(_own_steps(whole))
    if config.judged_on:
        key = hashlib.sha256(json.dumps([key, config.judged_on]).encode()).hexdigest()
    folder = config.out / config.name / key[:12]
    return CellTask(key[:12], settings, whole, dict(shared), folder, config.judged_on)


def _own_steps(config: PipelineConfig) -> list[Step]:
    """What a cell does of its own: it trains and is evaluated; no gate asks for its audit."""
    own = [step for step in _steps(config) if step.name in OWN]
    return [replace(s, after=tuple(n for n in s.after if n != "audit")) for s in own]


def _require_distinct(config: SweepConfig, base: PipelineConfig) -> None:
    """A report would count one cell twice, and two processes would train in one folder.

    Raises:
        UsageError: two cells differ in nothing that changes a result.
    """
    seen: dict[str, Settings] = {}
    for settings in config.settings():
        training = cell_config(base.train, config, settings, config.name)
        made = json.dumps(_construction(training), sort_keys=True)
        if made in seen:
            raise UsageError(
                "two cells of the sweep are the same",
                value=f"{json.dumps(seen[made])} and {json.dumps(settings)}",
                hint="leave one out; run.threads, a weight that the reward mode does not read, or "
                "an option of a phase without epochs changes no cell",
            )
        seen[made] = settings


def _construction(config: TrainConfig) -> dict[str, Any]:
    """What a training computes with: the reward as SQL, and no options of phases it has not (SFT is
    shared by all cells)."""
    found = keyed(config) | {"reward": reward_sql(config.reward)}
    return {
        section: values
        for section, values in found.items()
        if section != "sft" and (section not in ("rce", "grpo") or values["epochs"])
    }


def _run_missing(
    tasks: Sequence[CellTask], jobs: int, engine: Engine, say: Say, progress: Progress | None
) -> list[tuple[Settings, str]]:
    """Run the cells without a result; the settings and errors of those that failed."""
    waiting = [task for task in tasks if not task.result.exists()]
    if len(waiting) < len(tasks):
        say(f"{len(tasks) - len(waiting)} of {len(tasks)} cells are finished already")
    failed: list[tuple[Settings, str]] = []
    ended = _each(waiting, jobs, engine)
    for number, (task, error) in enumerate(ended, len(tasks) - len(waiting) + 1):
        if error:
            failed.append((task.settings, error))
            say(f"cell {task.cell} failed: {error}")
        if progress is not None:
            progress(number, len(tasks), json.dumps(task.settings))
    return failed


def _each(
    tasks: Sequence[CellTask], jobs: int, engine: Engine
) -> Iterator[tuple[CellTask, str | None]]:
    """Run cells, yielding each as it ends with why it failed; what is not a fault of the data is
    raised."""
    if engine.engine == "ray":
        numbers = [{"cell": number} for number in range(len(tasks))]
        for row in spread(CellWorker, (tasks,), numbers, engine):
            task = tasks[row["cell"]]
            lost = "its worker left no result here: every machine must see the folder of the sweep"
            yield task, row["error"] or (None if task.result.exists() else lost)
        return
    if jobs == 1:
        for task in tasks:
            yield task, try_cell(task)
        return
    # spawn: a forked child would share torch's threads and DuckDB's connections
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(try_cell, task): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()


def _report(
    config: SweepConfig,
    base: PipelineConfig,
    done: Sequence[CellTask],
    failed: Sequence[tuple[Settings, str]],
) -> SweepReport:
    scores, cells, evaluations = [], [], list[str]()
    con = connect(base.data.store, only=["evaluations"])
    for task in done:
        result = json.loads(task.result.read_bytes())
        evaluations += result["evaluations"]
        own = _per_query(con, result["evaluations"], "cell")
        scores.append(own)
        # without an SFT model the first cell of the file is what the others are compared with
        sft = _per_query(con, result["evaluations"], "sft")
        cells.append(_cell(task, result, own, sft if len(sft) else scores[0]))
    run = _commit(config, base, cells, evaluations)
    judged_on = not config.judged_on and _is_held_out(cells)
    distinct = np.unique(np.stack(scores, axis=1), axis=1)
    report = SweepReport(
        config.name,
        tuple(sorted(cells, key=lambda cell: _merit(cell, judged_on), reverse=True)),
        chance_lead(distinct),
        run.run,
        tuple(failed),
        distinct.shape[1],
        judged_on,
        {
            "dataset/split": f"{run.dataset}/{run.split}",
            "base": f"`{config.base}`",
            "answerer": base.answerer.spec,
            "run": f"`{run.run}`",
            "date": f"{run.committed_at[:16].replace('T', ' ')} UTC",
        },
        config.judged_on,
    )
    folder = config.out / config.name
    write_atomic(
        folder / "report.json",
        json.dumps(report.to_json(), indent=1, ensure_ascii=False).encode(),
    )
    write_atomic(folder / PAGE, sweep_page(report).encode())
    return report


def _is_held_out(cells: Sequence[Cell]) -> bool:
    """Whether held-out training questions can choose: every cell was validated on the same ones
    and the same candidates, so none sets what data it reads."""
    return all(
        cell.validation is not None and not any(name.startswith("data.") for name in cell.settings)
        for cell in cells
    )


def _merit(cell: Cell, is_held_out: bool) -> tuple[float, float]:
    return (cell.validation or 0.0) if is_held_out else cell.accuracy, cell.accuracy


def _per_query(con: duckdb.DuckDBPyConnection, runs: Sequence[str], selector: str) -> np.ndarray:
    """Mean accuracy of each query of these evaluations over the shot numbers, [n] float64; empty
    without the selector.

    A failed answer counts as 0 here, so that all cells are judged on the same queries.
    """
    rows = con.cursor().execute(
        "select avg(coalesce(accuracy, 0)) as mean from evaluations "
        "where list_contains(?, run) and selector = ? group by run, query_id "
        "order by list_position(?, run), query_id",
        [list(runs), selector, list(runs)],
    )
    return np.array([row[0] for row in rows.fetchall()], dtype=np.float64)


def _cell(
    task: CellTask, result: Mapping[str, Any], own: np.ndarray, reference: np.ndarray
) -> Cell:
    found = bootstrap_mean(own)
    change = bootstrap_mean(own - reference) if len(reference) == len(own) else None
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
        evaluation=str(result["evaluations"][0]),
        checkpoint=str(result["checkpoint"]),
        validation=result.get("validation"),
    )


def _commit(
    config: SweepConfig, base: PipelineConfig, cells: Sequence[Cell], parents: Sequence[str]
) -> Run:
    """The run of kind ``sweep`` with one row per cell, from the evaluations ``parents``."""
    rows = [
        {**asdict(cell), "sweep": config.name, "settings": json.dumps(cell.settings)}
        for cell in cells
    ]
    spec = RunSpec(
        kind="sweep",
        dataset=base.data.dataset,
        split=base.data.train_split if config.judged_on else base.data.eval_split,
        source_sha256=hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        parameters={"name": config.name},
        parents=tuple(dict.fromkeys(parents)),
    )
    store = Store.open(base.data.store)
    if (found := store.find(spec)) is not None:
        return found
    with store.begin(spec) as writer:
        writer.write("sweeps", pa.Table.from_pylist(rows, SWEEPS))
        return writer.commit()
