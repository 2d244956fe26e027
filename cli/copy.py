"""``lever copy``: runs from one store into another, in a folder or in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from lever_data.options import words
from lever_data.paths import store_path
from lever_data.vocabulary import JsonFile, RunNames

from .common import emit, emit_table, notice
from .flags import with_flags

Place = Annotated[Path, AfterValidator(store_path)]


@with_flags
def copy(
    source: Annotated[Place, words("The store to copy from.", metavar="SRC", argument=True)],
    target: Annotated[
        Place, words("The store to copy to, made if need be.", metavar="DST", argument=True)
    ],
    runs: RunNames = (),
    json: JsonFile = None,
) -> None:
    """Copy runs from one store into another, verified; what is there already is not sent again.

    Without --run all runs and your own views, features and tests. A folder also gets a README.md
    by which `datasets.load_dataset` reads its tables.
    """
    from lever_data.sources.transfer import transfer
    from lever_data.store.store import Store

    given = Store.open(source)
    with Store.to_fill(target) as filled:
        done = [
            {"run": one.run.run, "rows": one.run.num_rows, "is_new": one.is_new}
            for one in transfer(given, filled, runs, notice)
        ]
    if not emit(done, json):
        emit_table(["run", "rows", "is_new"], [[*row.values()] for row in done])
