"""What a selection holds and what its filters leave out, counted from its snapshot.

In go a :class:`~lever_data.relations.snapshot.Snapshot` and the selection of some of its queries;
out comes a :class:`Census`. Nothing reads the view again, unless several models answered.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from lever_data.relations.records import REASONS, Ids, Records, distinct
from lever_data.relations.snapshot import Snapshot
from lever_data.relations.stream import Selection, conditions, run_sql, union_sql

Place = tuple[str, str]


@dataclass(frozen=True)
class Census:
    """What a selection holds.

    ``dropped`` counts rows left out by reason (``eval_failed``, ``gen_method``, ``fallback``);
    ``emptied`` counts the queries of which nothing is left. ``last_query`` is the largest query id
    of the rows, -1 without any.
    """

    rows: int
    groups: int
    queries: int
    null_rewards: int
    datasets: tuple[Place, ...]
    scorers: tuple[str, ...]
    dropped: dict[str, int]
    emptied: int
    last_query: int


def census(con: duckdb.DuckDBPyConnection, snapshot: Snapshot, selection: Selection) -> Census:
    """Count what the selection holds and what its filters leave out.

    Args:
        snapshot: of the selection, of all queries.
        selection: with the queries that are counted.
    """
    groups, dropped = snapshot.groups, snapshot.dropped
    of_groups = snapshot.is_of(con, selection.queries, groups)
    of_dropped = snapshot.is_of(con, selection.queries, dropped)
    kept, lost = _queries(snapshot, groups, of_groups), _queries(snapshot, dropped, of_dropped)
    none = np.empty(0, np.int64)
    count = dropped["count"]
    return Census(
        rows=int(groups["size"].sum(where=of_groups)),
        groups=int(of_groups.sum()),
        queries=sum(map(len, kept.values())),
        null_rewards=int(groups["nulls"].sum(where=of_groups)),
        datasets=tuple(sorted(kept)),
        scorers=_scorers(con, snapshot, selection) if kept else (),
        dropped={
            reason: int(count.sum(where=of_dropped & (dropped["reason"] == number)))
            for number, reason in enumerate(REASONS)
        },
        emptied=sum(
            int((~np.isin(ids, kept.get(place, none))).sum()) for place, ids in lost.items()
        ),
        last_query=max((int(ids[-1]) for ids in kept.values()), default=-1),
    )


def _queries(snapshot: Snapshot, keys: Records, chosen: NDArray[np.bool_]) -> dict[Place, Ids]:
    """The distinct queries of the chosen keys, ascending, by the place they are of."""
    found = {}
    for d, dataset in enumerate(snapshot.datasets):
        for s, split in enumerate(snapshot.splits):
            ids = keys["query_id"][chosen & (keys["dataset"] == d) & (keys["split"] == s)]
            ids.sort()
            if len(ids):
                found[dataset, split] = distinct(ids)
    return found


def _scorers(
    con: duckdb.DuckDBPyConnection, snapshot: Snapshot, selection: Selection
) -> tuple[str, ...]:
    """The models that answered the candidates of a selection that holds some."""
    if not snapshot.scorers or (len(snapshot.scorers) == 1 and not snapshot.unscored):
        return snapshot.scorers  # of all of them
    left_out = " or ".join(f"({condition})" for condition in conditions(selection))
    sql = (
        f"select distinct scorer from ({union_sql(con, selection)}) "
        f"where not ({left_out}) and scorer is not null order by 1"
    )
    found = run_sql(con.cursor(), sql, {"methods": list(selection.gen_methods)}).fetchall()
    return tuple(row[0] for row in found)
