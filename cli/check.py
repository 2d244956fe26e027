"""``lever check``: is the store what its manifests say, and do its rows make sense?"""

from __future__ import annotations

from .common import DEFAULT_STORE, JsonFlag, RunsOption, StoreOption, emit_json


def check(
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    json: JsonFlag = False,
) -> None:
    """Verify checksums, schemas and data tests; your own tests in <store>/tests/ too.

    A test is a .sql file with one SELECT whose rows are failures. Exit code 1 where anything is
    wrong.
    """
    from dataclasses import asdict

    from lever_data.report.check import check, counted, describe, require_sound
    from lever_data.store.store import Store

    report = check(Store.open(store), runs=run)
    if json:
        emit_json(asdict(report))
    else:
        for problem in report.problems:
            print(describe(problem))
        print(
            f"checked {counted(report.num_runs, 'run')}, {counted(report.num_files, 'file')}, "
            f"{counted(report.num_tests, 'test')}: {counted(len(report.problems), 'problem')}"
        )
    require_sound(report)
