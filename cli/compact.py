"""``lever compact``: many small runs as one."""

from __future__ import annotations

from typing import Annotated

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, DryRun, JsonFile, RunNames, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags


@with_flags
def compact(
    store: StorePath = DEFAULT_STORE,
    runs: RunNames = (),
    max_candidates: Annotated[
        int, words("Larger runs stay as they are.", metavar="N", everyday=True, ge=1)
    ] = 1_000_000,
    dry_run: DryRun = False,
    json: JsonFile = None,
) -> None:
    """Merge small runs of one kind into one; every view has the rows it had.

    Runs of RL data of the same kind, dataset, split, scorer, policy and metric become one where no
    two of them hold the same query. The runs it holds stay, hidden: --as-of and --run read them,
    and `lever runs rm` deletes them.
    """
    from lever_data.store.compact import compact
    from lever_data.store.store import Store

    found = compact(Store.open(store), runs, max_candidates=max_candidates, dry_run=dry_run)
    done = [{"run": c.run, "rows": c.rows, "members": [m.run for m in c.members]} for c in found]
    if emit(done, json):
        return
    if not found:
        notice("There is nothing to merge.")
        return
    emit_table(["run", "rows", "runs in it"], [[c.run, c.rows, len(c.members)] for c in found])
    if not dry_run:
        notice("the runs in them are hidden now and stay on disk until `lever runs rm`")
