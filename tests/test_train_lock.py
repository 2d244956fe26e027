"""One training at a time writes a folder: a second one is refused, and a killed one bars nobody."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import LeverError, UsageError
from lever_train.learn.folder import TrainingFolder
from tests.cases import long
from tests.training import Bench, equal

REFUSED = "another training writes --out at this moment"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Another training than the default one, in ``out``; only read."""
    bench = Bench(tmp_path_factory.mktemp("older"))
    bench.train(rce_epochs=1, seed=1)
    return bench


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "word"),
    [
        ("anew", {}),
        long("anew", {"resume": True}),
        long("overwrite", {"resume": True}),
        long("overwrite", {"overwrite": True}),
    ],
)
def test_a_second_training_is_refused_and_changes_nothing(
    finished: Bench, older: Bench, tmp_path: Path, word: dict[str, Any], begun: str
) -> None:
    bench = older.copy(tmp_path) if begun == "overwrite" else Bench(tmp_path)
    second = Bench(tmp_path / "second")
    errors: list[str] = []

    def meanwhile(done: float, total: float | None, note: str = "") -> None:
        if not errors:
            with pytest.raises(LeverError, match=REFUSED) as error:
                second.train("../out", seed=2, **word)
            errors.append(str(error.value.hint))

    bench.train(overwrite=begun == "overwrite", advance=meanwhile)
    assert errors == ["wait until it ends, or name another --out"]
    assert equal(bench.tensors("out"), finished.tensors("out"))


@pytest.mark.long
def test_the_next_training_begins_where_one_ended_or_failed(trained: Bench) -> None:
    for _ in range(2):
        with pytest.raises(UsageError, match="holds another training"):
            trained.train()
    trained.train(resume=True)


@pytest.mark.long
def test_two_that_begin_with_no_folder_do_not_mix(tmp_path: Path) -> None:
    """Both looked before either wrote: whoever makes the folder second finds a training there."""
    bench = Bench(tmp_path)
    late = TrainingFolder(tmp_path / "out")
    late.check(resume=False, overwrite=False)

    def meanwhile(done: float, total: float | None, note: str = "") -> None:
        with pytest.raises(LeverError, match=REFUSED):
            late.prepare()

    bench.train(advance=meanwhile)
    with pytest.raises(UsageError, match="holds another training"):
        late.prepare()
    late.release()


def test_a_lock_deleted_as_it_is_taken_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waits at the file that the other deletes: it must not hold a file nobody sees."""
    first, second, third = (TrainingFolder(tmp_path) for _ in range(3))
    first.check(resume=False, overwrite=False)
    flock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(LeverError, match=REFUSED):
        second.check(resume=False, overwrite=False)
    third.check(resume=False, overwrite=False)
    third.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out" / ".training.lock").mkdir(parents=True)
    with pytest.raises(LeverError, match=r"cannot be locked \(Is a directory\)"):
        Bench(tmp_path).train()
