"""kill -9 during rescore: the new run is there whole or not at all, and its parent stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from lever_data.store.staging import sweep
from lever_data.store.store import Store
from tests.stores import candidate, commit
from tests.test_rescore import write_official
from tests.torture.conftest import Report
from tests.torture.harness import (
    SIZES,
    Nursery,
    Outcome,
    moments,
    verify,
    verify_checks,
    verify_swept,
)


@pytest.mark.long
@pytest.mark.parametrize("long", SIZES)
def test_rescore_killed_at_any_moment(
    tmp_path: Path, nursery: Nursery, report: Report, long: bool
) -> None:
    write_official(tmp_path, {100 + i: ["red"] * 4 + ["two"] * 6 for i in range(4)})
    store = Store.create(tmp_path / "store")
    rows = [
        candidate(q, c, [c + 10, c + 11], answer="red", eval_mode="fallback", eval_split="train")
        for q in range(4)
        for c in range(3)
    ]
    parent = commit(store, rows)
    before = verify(store.path)

    def rescore(**kill: float | int) -> Outcome:
        files = ("--questions", tmp_path / "q.json", "--annotations", tmp_path / "a.json")
        words = ("rescore", "--store", store.path, "--run", parent.run, *files, "--allow-missing")
        return nursery.run(*words, **kill)  # type: ignore[arg-type]

    undisturbed = rescore()
    assert undisturbed.code == 0, undisturbed.stderr
    after = verify(store.path)
    (made,) = after.keys() - before.keys()
    store.remove(made)
    assert undisturbed.changes is not None
    changes = range(1, undisturbed.changes + 1, 1 if long else 15)
    kills: list[dict[str, float | int]] = [{"kill_before": n} for n in changes]
    spread = moments(200 if long else 1, undisturbed.seconds, seed=1)
    kills += [{"kill_after": seconds} for seconds in spread]
    killed = 0
    for kill in kills:
        killed += rescore(**kill).killed
        assert verify_checks(store.path) in (before, after)
        assert rescore().code == 0
        assert verify(store.path) == after
        sweep(store.staging_folder)
        verify_swept(store.path)
        store.remove(made)
    report(f"{killed} kills")
    assert killed >= 2
