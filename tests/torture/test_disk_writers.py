"""No room for generate, train, rescore or eval: a clear error, nothing committed, then it works.

RLIMIT_FSIZE stands for the full disk here; ``test_disk.py`` has real small ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lever_data.store.store import Store
from tests.rollouts import make_world
from tests.stores import candidate, commit
from tests.test_rescore import write_official
from tests.torture.conftest import Report
from tests.torture.harness import Nursery, is_clear, verify, verify_checks
from tests.training import Bench

Words = list[str | Path]
LIMITS = (200, 2_000)  # bytes a file may grow to; every one of these commands needs more


def _generate(folder: Path) -> tuple[Path, Words]:
    world = make_world(folder, queries=16)
    return world.store, list(world.argv())


def _rescore(folder: Path) -> tuple[Path, Words]:
    write_official(folder, {100 + i: ["red"] * 4 + ["two"] * 6 for i in range(4)})
    store = Store.create(folder / "store")
    rows = [
        candidate(q, c, [c + 10, c + 11], answer="red", eval_mode="fallback", eval_split="train")
        for q in range(4)
        for c in range(3)
    ]
    parent = commit(store, rows)
    files: Words = ["--questions", folder / "q.json", "--annotations", folder / "a.json"]
    words: Words = ["rescore", "--store", store.path, "--run", parent.run, "--allow-missing"]
    return store.path, [*words, *files]


def _train(folder: Path) -> tuple[Path, Words]:
    bench = Bench(folder)
    words: Words = ["train", "--store", bench.store.path, "--out", folder / "out", "--overwrite"]
    for name, value in bench.flags(grpo_epochs=1).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return bench.store.path, words


@pytest.mark.long
@pytest.mark.parametrize("make", [_generate, _rescore, _train])
def test_a_limit_on_file_sizes_commits_nothing(
    tmp_path: Path, warm: Nursery, report: Report, make: Callable[[Path], tuple[Path, Words]]
) -> None:
    store, words = make(tmp_path)
    before = verify(store) if store.exists() else {}
    for limit in LIMITS:
        outcome = warm.run(*map(str, words), file_limit=limit)
        # a limit below the error's own length cuts the error short too
        assert outcome.code == 1 and (limit < 1_000 or is_clear(outcome)), outcome.stderr
        assert not (store / "runs").exists() or verify_checks(store) == before
    assert warm.run(*map(str, words)).code == 0
    after = verify_checks(store)
    assert after.keys() > before.keys()
    for name in after.keys() - before.keys():
        Store.open(store).remove(name)
    shutil.rmtree(store / "cache", ignore_errors=True)
    report(f"{words[0]}: {len(LIMITS)} limits")
