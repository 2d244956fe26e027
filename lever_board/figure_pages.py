"""The pages of what was measured: *Audit*, *Training*, *Evaluation*, *Sweep*, *Compare*.

In go what the commands stored or would compute; out come the same figures and tables that their own
pages hold, made by the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lever_board.page import Content, PageRequest, working
from lever_board.query_pages import Key, asked_items, reward_of, training_views
from lever_board.store_pages import place_text, short_name, time_text
from lever_data.catalog import RL_KINDS, reward_modes
from lever_data.errors import LeverError
from lever_data.report.audit import Audit
from lever_data.report.audit_page import audit_content
from lever_data.report.page import Figure, Section, Table, percent
from lever_data.report.statistics import chance_lead
from lever_data.store.store import Run
from lever_train.evaluate.scoreboard_page import scoreboard_figures
from lever_train.evaluate.scores import PairTest, Scoreboard, shots_said
from lever_train.flow.sweep_page import Cell, SweepReport, luck, sweep_figures
from lever_train.learn.curves import curves

METRICS = "metrics.parquet"  # of a folder that `lever train` writes
FOLLOW = 2000  # milliseconds between two looks at a training
APART = 50  # questions of a page that two selectors disagree on


def audit_page(asked: PageRequest) -> Content:
    """The page of `lever audit` over a view."""
    view, reward = asked.text("view", "all_candidates"), reward_of(asked)
    survey = asked.board.survey(asked.state, view, reward)
    if survey is None:
        return working(f"Audit of {view}")
    title, facts, more = audit_content([Audit(survey.audit["figures"], survey.audit["sql"])])
    choices = {
        "views": training_views(asked),
        "modes": [(mode, mode) for mode in reward_modes()],
        "view": view,
        "mode": reward.mode,
    }
    return Content(title, facts, template="board_audit.html", more={**more, **choices})


def training_page(asked: PageRequest) -> Content:
    """Curves of trainings over each other; those that run now go on by themselves."""
    runs = asked.state.kind("training")
    live = live_trainings(asked)
    chosen = asked.all("run")
    if not chosen:
        chosen = [str(path) for path in live] or [run.run for run in runs[:1]]
    tables, queries = {}, []
    for name in chosen:
        if Path(name) in live:
            tables[Path(name).name or name] = pl.read_parquet(Path(name) / METRICS)
        else:
            run = asked.state.store.run(name)
            tables[short_name(run)] = _metrics(asked, run)
            counts = run.details.get("provenance", {}).get("queries", {})
            queries.append(", ".join(f"{count:,} for {use}" for use, count in counts.items()))
    is_followed = any(Path(name) in asked.board.trainings for name in chosen)
    is_followed |= bool(asked.board.trainings) and not asked.all("run")  # one may yet begin
    sections = curves(tables) if tables else []
    return Content(
        "Training",
        {
            "trainings": ", ".join(tables) or None,
            "queries": "; ".join(filter(None, queries)) or None,
        },
        template="training.html",
        sections=sections,
        more={
            "choices": [(str(p), f"{p} (being written)", str(p) in chosen) for p in live]
            + [(r.run, f"{short_name(r)}, {time_text(r)}", r.run in chosen) for r in runs],
            "follow": FOLLOW if asked.links.is_live and is_followed else 0,
            "awaited": [str(path) for path in asked.board.trainings if path not in live],
        },
    )


def live_trainings(asked: PageRequest) -> list[Path]:
    """The folders the reader named that hold metrics, each once."""
    return [path for path in asked.board.trainings if (path / METRICS).exists()]


def _metrics(asked: PageRequest, run: Run) -> pl.DataFrame:
    con = asked.state.session().con.cursor()
    sql = """
        select phase, epoch, step, metric, value
        from training_metrics
        where run = ?
        order by phase <> 'sft', phase <> 'rce', epoch, step, metric
    """
    return pl.DataFrame(con.sql(sql, params=[run.run]).to_arrow_table())


def evaluation_page(asked: PageRequest) -> Content:
    """Accuracy by shots, and the paired differences with the questions behind them."""
    runs = asked.state.kind("evaluation")
    if not runs:
        return _nothing("Evaluation", "No evaluation is stored yet.", "lever eval")
    run = asked.state.store.run(asked.text("run", runs[0].run))
    board = _scoreboard(run)
    figures = [f for f in scoreboard_figures(board).figures if f.title != "Paired by question"]
    return Content(
        f"Evaluation on {place_text(run)}",
        {
            "run": f"`{run.run}`",
            "questions": f"{max(row.n + row.failed for row in board.rows):,}",
            "answerer": str(run.parameters.get("answerer", "")) or None,
            "committed": time_text(run),
        },
        template="evaluation.html",
        sections=[Section(figures)],
        more={
            "run": run.run,
            "runs": [(r.run, f"{place_text(r)}, {time_text(r)}, {r.run[-12:]}") for r in runs],
            "pairs": [asdict(mark) for mark in forest(board.paired)],
        },
    )


def _scoreboard(run: Run) -> Scoreboard:
    found = run.details.get("scoreboard")
    if found is None:
        raise LeverError(
            "this evaluation holds no scoreboard", where=run.run, hint="run `lever eval` again"
        )
    return Scoreboard.of(found)


@dataclass(frozen=True)
class Mark:
    """A row of the forest plot; ``zero``, ``at``, ``low`` and ``high`` in [0, 1000] across it."""

    pair: PairTest
    zero: float
    at: float
    left: float
    right: float


def forest(pairs: Sequence[PairTest]) -> list[Mark]:
    """PairTest differences on one scale."""
    low = min((p.low for p in pairs), default=0.0)
    high = max((p.high for p in pairs), default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low or 1.0) * 0.04

    def place(value: float) -> float:
        return round(1000 * (value - low + room) / (high - low + 2 * room), 1)

    return [Mark(p, place(0), place(p.difference), place(p.low), place(p.high)) for p in pairs]


def disagree_page(asked: PageRequest) -> Content:
    """The questions on which two selectors of an evaluation differ, worst for A first."""
    run = asked.state.store.run(asked.text("run"))
    a, b, shots = asked.text("a"), asked.text("b"), asked.number("shots")
    number = max(asked.number("page", 1), 1)
    only = "only" in asked.parameters
    given: dict[str, object] = {"run": run.run, "shots": shots}
    if not only:
        given |= {"a": a, "b": b}
    con = asked.state.session().con.cursor()
    con.execute(_ALL_WRONG if only else _APART, given)
    names = [column[0] for column in con.description or ()]
    rows = [dict(zip(names, row, strict=True)) for row in con.fetchall()]
    shown = rows[(number - 1) * APART : number * APART]
    items = asked_items(asked, [Key(r["dataset"], r["split"], r["query_id"]) for r in shown])
    title = "Every selector wrong, the oracle right" if only else f"{a} and {b} disagree"
    return Content(
        f"{title}, {shots_said(shots)}",
        {
            "run": f"`{run.run}`",
            "questions": f"{len(rows):,}",
            "mean difference there": f"{100 * np.mean([r['change'] for r in rows]):+.2f} points"
            if rows
            else None,
        },
        template="disagree.html",
        more={
            "rows": [
                (row, items.get(Key(row["dataset"], row["split"], row["query_id"])))
                for row in shown
            ],
            "a": "the others" if only else a,
            "b": "oracle" if only else b,
            "parameters": dict(asked.parameters),
            "number": number,
            "last": -(-len(rows) // APART),
        },
    )


_APART = """
    with asked as (
        select * from evaluations
        where run = $run and (shots = $shots or selector = 'zero_shot')
    ),
    a as (select * from asked where selector = $a),
    b as (select * from asked where selector = $b)

    select
        dataset,
        split,
        query_id,
        a.accuracy as accuracy_a,
        b.accuracy as accuracy_b,
        a.prediction as prediction_a,
        b.prediction as prediction_b,
        a.accuracy - b.accuracy as change
    from a
    inner join b using (dataset, split, query_id)
    where a.accuracy <> b.accuracy
    order by change, dataset, split, query_id
"""
_ALL_WRONG = """
    select
        dataset,
        split,
        query_id,
        max(accuracy) filter (selector <> 'oracle') as accuracy_a,
        max(accuracy) filter (selector = 'oracle') as accuracy_b,
        any_value(prediction) filter (
            selector not in ('oracle', 'random', 'nearest')
        ) as prediction_a,
        any_value(prediction) filter (selector = 'oracle') as prediction_b,
        max(accuracy) filter (selector <> 'oracle')
        - max(accuracy) filter (selector = 'oracle') as change
    from evaluations
    where run = $run and shots = $shots
    group by dataset, split, query_id
    having accuracy_a = 0 and accuracy_b > 0
    order by change, dataset, split, query_id
"""


def sweep_page(asked: PageRequest) -> Content:
    """The cells of a sweep, and how far luck alone would put one ahead."""
    con = asked.state.session().con.cursor()
    names = [row[0] for row in con.execute(_SWEEPS).fetchall()]
    if not names:
        return _nothing("Sweep", "No sweep is stored yet.", "lever sweep GRID.toml")
    name = asked.text("sweep", names[0])
    con.execute("select * from sweeps where sweep = ? order by accuracy desc, cell", [name])
    columns = [column[0] for column in con.description or ()]
    rows = [dict(zip(columns, row, strict=True)) for row in con.fetchall()]
    if not rows:
        raise LeverError("there is no such sweep", value=name, hint=", ".join(names))
    scores = np.stack([_per_query(asked, row["evaluation"]) for row in rows], axis=1)
    distinct = np.unique(scores, axis=1)
    own = ("sweep", "run", "settings")
    cells = tuple(
        Cell(settings=json.loads(row["settings"]), **{k: v for k, v in row.items() if k not in own})
        for row in rows
    )
    report = SweepReport(name, cells, chance_lead(distinct), rows[0]["run"], (), distinct.shape[1])
    note = "By accuracy, mean over shot numbers, with its 95 % interval. " + luck(report)
    return Content(
        f"Sweep {name}",
        {"cells": f"{len(cells)}", "questions": f"{cells[0].num_queries:,}"},
        template="sweep.html",
        sections=[sweep_figures(report, note)],
        more={
            "names": [(n, n) for n in names],
            "name": name,
            "evaluations": [(f"cell {n}", cell.evaluation) for n, cell in enumerate(cells, 1)],
        },
    )


_SWEEPS = """
    select sweeps.sweep
    from sweeps
    inner join runs using (run)
    group by sweeps.sweep
    order by max(runs.run_order) desc
"""


def _per_query(asked: PageRequest, run: str) -> np.ndarray:
    """Mean accuracy of the cell on each query over the shot numbers; a failed answer counts 0."""
    con = asked.state.session().con.cursor()
    rows = con.execute(
        "select avg(coalesce(accuracy, 0)) from evaluations "
        "where run = ? and selector = 'cell' group by query_id order by query_id",
        [run],
    ).fetchall()
    return np.array([row[0] for row in rows], dtype=np.float64)


def compare_page(asked: PageRequest) -> Content:
    """Two runs, views or selectors of evaluations, as `lever diff` compares them."""
    groups = _sides(asked)
    choices = [one for group in groups for one in group]
    alike = next((group for group in groups if len(group) > 1), choices)[:2]  # offered first
    a, b = asked.text("a"), asked.text("b")
    sections = []
    if a and b:
        found = asked.board.difference(asked.state, a, b)
        if found is None:
            return working("Compare")
        sections = [Section([_difference(found)])]
    return Content(
        "Compare",
        {"A": f"`{a}`" if a else None, "B": f"`{b}`" if b else None},
        template="compare.html",
        sections=sections,
        more={
            "choices": choices,
            "a": a or next((name for name, _ in alike), ""),
            "b": b or next((name for name, _ in alike[1:]), ""),
        },
    )


def _sides(asked: PageRequest) -> list[list[tuple[str, str]]]:
    """What can be compared, what is alike together: runs with candidates, the selectors of each
    evaluation, views."""
    found = [[(run.run, f"run {run.run}") for run in asked.state.kind(*RL_KINDS)]]
    for run in asked.state.kind("evaluation"):
        rows = (run.details.get("scoreboard") or {"rows": []})["rows"]
        names = dict.fromkeys(row["selector"] for row in rows)
        found.append([(f"{run.run}:{n}", f"{n} of {run.run}") for n in names])
    return [*found, [(name, f"view {words}") for name, words in training_views(asked)]]


def _difference(found: Mapping[str, Any]) -> Figure:
    """What `lever diff` says, in its order."""
    what = "queries and shot numbers" if found["kind"] == "evaluations" else "candidates"
    rows: list[tuple[str, str | int]] = [
        (f"{what} both have", found["pairs"]),
        ("of them with another score", found["changed"]),
        ("only A has", found["only_a"]),
        ("only B has", found["only_b"]),
    ]
    if found["mean_change"] is not None:
        change = f"{100 * found['mean_change']:+.2f} points"
        rows.append(("mean change in accuracy, B − A", change))
    if found["low"] is not None:  # one pair alone has none
        low, high = (100 * found[k] for k in ("low", "high"))
        rows.append(("its 95 % interval", f"{low:+.2f} to {high:+.2f} points"))
    rows.append(("questions with a pick on both sides", found["picks"]))
    if found["picks"]:
        rows.append(("picks right in A", percent(found["picks_right_a"])))
        rows.append(("picks right in B", percent(found["picks_right_b"])))
        rows.append(("right only in A", found["mcnemar_only_a"]))
        rows.append(("right only in B", found["mcnemar_only_b"]))
        rows.append(("McNemar's p", f"{found['mcnemar_p']:.2g}"))
    note = "As `lever diff A B`: pairs are by query and ordered demonstrations."
    return Figure("B against A", note, table=Table(("what", "value"), rows))


def _nothing(title: str, what: str, command: str) -> Content:
    return Content(title, template="nothing.html", more={"what": what, "command": command})
