"""Compact a store: small runs of one kind become one run that stands for them.

In goes a store; out comes a run for every group of small ones of the same kind, dataset, split,
scorer, policy, generation and metric, with their rows as they are. No two of a group hold the same
query, and no other run between them holds a query of theirs, so that every relation has the rows it
had, all but their ``run``. The members stay in the store, hidden, for ``--as-of`` and for whoever
reads them at this moment (``history.py``); the commit of the new run hides them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lever_data.catalog import RL_KINDS
from lever_data.store.history import MEMBERS
from lever_data.store.integrity import require_intact
from lever_data.store.manifest import Run, RunSpec
from lever_data.store.schema import todays, under_todays_names
from lever_data.store.store import Store
from lever_data.store.writer import ROW_GROUP

MAX_CANDIDATES = 1_000_000
_SAME = ("scorer", "policy", "generation", "versions")  # parameters of runs that may be one run


@dataclass(frozen=True)
class Compaction:
    """A run, there or only planned, and the runs whose rows it holds."""

    run: str
    members: tuple[Run, ...]

    @property
    def rows(self) -> int:
        """Its candidates."""
        return sum(member.num_rows for member in self.members)


def compact(
    store: Store,
    runs: Sequence[str] = (),
    *,
    max_candidates: int = MAX_CANDIDATES,
    dry_run: bool = False,
) -> list[Compaction]:
    """Merge small runs; a run that stands alone stays as it is.

    Args:
        runs: only these; all where empty.
        max_candidates: larger runs stay as they are.
        dry_run: only say what would be merged.

    Raises:
        LeverError: a run is damaged, or the disk is full. What was merged before stays.
    """
    everything = store.runs()
    chosen = {run.run for run in store.select(list(runs)) if run.num_rows <= max_candidates}
    done = []
    for members in _groups(everything, chosen):
        spec = _spec(members)
        if not dry_run:
            _merge(store, spec, members)
        done.append(Compaction(spec.run_id(), tuple(members)))
    return done


def _groups(runs: Sequence[Run], chosen: Collection[str]) -> list[list[Run]]:
    """The groups of at least two. A group ends where a later run holds a query of it."""
    closed: list[list[Run]] = []
    open_groups: dict[str, tuple[list[Run], set[int]]] = {}
    for run in runs:
        if run.kind not in RL_KINDS:
            continue
        queries = _queries(run)
        for key, (members, held) in list(open_groups.items()):
            place = members[0].dataset, members[0].split
            if place == (run.dataset, run.split) and not held.isdisjoint(queries):
                closed.append(open_groups.pop(key)[0])
        if run.run in chosen:
            members, held = open_groups.setdefault(_alike(run), ([], set()))
            members.append(run)
            held.update(queries)
    groups = [*closed, *(members for members, _ in open_groups.values())]
    return [members for members in groups if len(members) > 1]


def _queries(run: Run) -> list[int]:
    require_intact([run])
    found: list[int] = []
    for table in run.rows:
        for file in run.table_files(table):
            column = pq.read_table(file, columns=["query_id"], partitioning=None).column(0)
            found += pc.unique(column).to_pylist()
    return found


def _alike(run: Run) -> str:
    """What runs must share to be one run: also the columns of their tables, as files are of one
    schema."""
    same = {name: run.parameters.get(name) for name in _SAME}
    tables = {name: str(_schema(run, name)) for name in run.rows}
    return json.dumps([run.kind, run.dataset, run.split, same, tables], sort_keys=True)


def _schema(run: Run, table: str) -> pa.Schema:
    return todays(pq.read_schema(run.table_files(table)[0]).remove_metadata())


def _spec(members: Sequence[Run]) -> RunSpec:
    first = members[0]
    same = {name: first.parameters[name] for name in _SAME if name in first.parameters}
    held = {run.run for run in members}.union(*(run.parameters.get(MEMBERS, ()) for run in members))
    return RunSpec(
        kind=first.kind,
        dataset=first.dataset,
        split=first.split,
        parameters=same | {MEMBERS: sorted(held)},
        parents=tuple(run.run for run in members),
    )


def _merge(store: Store, spec: RunSpec, members: Sequence[Run]) -> None:
    require_intact(members)  # in a bucket they were fetched one by one, and may be gone again
    details = {"stands_at": members[-1].place[0]}
    prompts = [run.details.get("prompts") for run in members]
    if prompts[0] is not None and all(one == prompts[0] for one in prompts):
        details["prompts"] = prompts[0]
    with store.begin(spec) as writer:
        for table in members[0].rows:
            for run in sorted(members, key=lambda run: (run.query_range or (0, 0), run.run)):
                for path in run.table_files(table):
                    with pq.ParquetFile(path) as file:
                        for batch in map(under_todays_names, file.iter_batches(ROW_GROUP)):
                            writer.write(table, batch)
        writer.commit(details)
