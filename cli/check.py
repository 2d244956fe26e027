"""``lever check``: is the store what its manifests say, and do its rows make sense?"""

from __future__ import annotations

from lever_data.vocabulary import DEFAULT_STORE, JsonFile, RunNames, StorePath

from .common import emit
from .flags import with_flags


@with_flags
def check(store: StorePath = DEFAULT_STORE, runs: RunNames = (), json: JsonFile = None) -> None:
    """Verify checksums, schemas and data tests; your own tests in <store>/tests/ too.

    A test is a .sql file with one SELECT whose rows are failures. Exit code 1 where anything is
    wrong.
    """
    from dataclasses import asdict

    from lever_data.report.check import check, counted, describe, require_sound
    from lever_data.store.store import Store

    report = check(Store.open(store), runs=runs)
    if not emit(asdict(report), json):
        for problem in report.problems:
            print(describe(problem))
        print(
            f"checked {counted(report.num_runs, 'run')}, {counted(report.num_files, 'file')}, "
            f"{counted(report.num_tests, 'test')}: {counted(len(report.problems), 'problem')}"
        )
    require_sound(report)
