"""The pages *Store* and *Run*: what there is, what was made from what, what a manifest says.

In goes the inventory of the store; nothing of a table is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from lever_board.page import Content, PageRequest
from lever_data.store.store import Run

_LINE, _COLUMN, _BOX = 44, 260, 220  # of the drawing, in its units
_SHOWN = {  # kind of run → the page that shows what is in it
    "training": "training",
    "evaluation": "evaluation",
    "sweep": "sweep",
}


@dataclass(frozen=True)
class Node:
    """A run's place in the drawing of what was made from what."""

    run: str
    kind: str
    x: int
    y: int
    is_damaged: bool


def store_page(asked: PageRequest) -> Content:
    """Every run, newest first, and how they hang together."""
    state = asked.state
    runs = list(reversed(state.all_runs))
    lost = sorted(state.damaged.keys() - {run.run for run in runs})
    nodes, lines = lineage(state.all_runs, state.damaged)
    total = sum(size(run) for run in runs)
    scorers = scorers_of(state.runs)
    return Content(
        "Store",
        {
            "runs": f"{len(runs) + len(lost)}",
            "size": bytes_text(total),
            "candidates": f"{sum(run.rows.get('candidates', 0) for run in runs):,} stored",
        },
        template="store.html",
        more={
            "rows": [_row(run, scorers.get(run.run)) for run in runs],
            "lost": lost,
            "nodes": nodes,
            "lines": lines,
            "width": max((node.x + _BOX for node in nodes), default=0) + 2,
            "height": max((node.y + _LINE for node in nodes), default=0),
            "box": _BOX,
        },
    )


def run_page(asked: PageRequest) -> Content:
    """What one run's manifest says."""
    state = asked.state
    name = asked.state.store.inventory().name_of(asked.text("run"))
    run = next((run for run in state.all_runs if run.run == name), None)
    if run is None:
        return Content(f"Run {name}", template="run.html", more={"run": None, "name": name})
    return Content(
        f"Run {name}",
        {
            "kind": run.kind,
            "dataset/split": place_text(run),
            "committed": time_text(run),
            "size": bytes_text(size(run)),
        },
        template="run.html",
        more={
            "run": run,
            "name": name,
            "children": [r.run for r in state.all_runs if name in r.parents],
            "shown": _SHOWN.get(run.kind),
            "inputs": run.details.get("inputs", []),
            "tables": list(run.rows.items()),
            "fields": {
                "source": run.source,
                "parameters": run.parameters,
                "details": run.details,
                "files": run.files,
            },
            "as_json": as_json,
        },
    )


def _row(run: Run, scorer: str | None) -> Mapping[str, Any]:
    return {
        "run": run.run,
        "kind": run.kind,
        "place": place_text(run) or "–",
        "rows": run.num_rows,
        "bytes": size(run),
        "size": bytes_text(size(run)),
        "scorer": scorer or run.parameters.get("answerer") or "–",
        "when": time_text(run),
        "parents": run.parents,
    }


def scorers_of(runs: Sequence[Run]) -> dict[str, str]:
    """The model that answered the candidates of each run; of several, the first and the last.

    From what the Parquet files say of themselves: no row is read.
    """
    run_of = {str(file): run.run for run in runs for file in run.table_files("candidates")}
    if not run_of:
        return {}
    found: dict[str, set[str]] = {}
    with duckdb.connect() as con:
        rows = con.execute(_SCORERS, [list(run_of)]).fetchall()
    for file, *names in rows:
        found.setdefault(run_of[file], set()).update(name for name in names if name is not None)
    return {run: " … ".join(sorted({min(n), max(n)})) for run, n in found.items() if n}


_SCORERS = """
    select file_name, min(stats_min_value), max(stats_max_value)
    from parquet_metadata(?)
    where path_in_schema = 'scorer'
    group by file_name
"""


def lineage(runs: Sequence[Run], damaged: Mapping[str, object]) -> tuple[list[Node], list[str]]:
    """Runs as boxes, what they were made from on their left, and the lines between (SVG paths)."""
    known = {run.run: run for run in runs}
    depth: dict[str, int] = {}
    for run in runs:  # oldest first: parents come before their children
        above = [depth[parent] for parent in run.parents if parent in depth]
        depth[run.run] = max(above, default=-1) + 1
    filled: dict[int, int] = {}
    nodes: dict[str, Node] = {}
    for name, column in depth.items():
        row = filled[column] = filled.get(column, -1) + 1
        is_damaged = name in damaged
        nodes[name] = Node(name, known[name].kind, column * _COLUMN, row * _LINE, is_damaged)
    lines = []
    for run in runs:
        for parent in run.parents:
            if parent in nodes:
                a, b = nodes[parent], nodes[run.run]
                x0, y0, x1, y1 = a.x + _BOX, a.y + 18, b.x, b.y + 18
                half = (x0 + x1) // 2
                lines.append(f"M{x0} {y0}C{half} {y0} {half} {y1} {x1} {y1}")
    return list(nodes.values()), lines


def size(run: Run) -> int:
    """Bytes of its files; what is missing has none."""
    paths = [run.path / name for name in run.files]
    return sum(path.stat().st_size for path in paths if path.exists())


def bytes_text(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def place_text(run: Run) -> str | None:
    """``dataset/split`` as far as they are known."""
    return "/".join(part for part in (run.dataset, run.split) if part) or None


def short_name(run: Run) -> str:
    """What tells a run apart from its like: the folder it was written from, and its digest."""
    path = str(run.source.get("path", ""))
    name = Path(path).name if run.kind == "training" and path else run.kind
    return f"{name} {run.run[-12:]}"


def time_text(run: Run) -> str:
    """When it was committed, to the minute."""
    return f"{run.committed_at[:16].replace('T', ' ')} UTC"


def as_json(value: object) -> str:
    """A part of a manifest, for people."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
