"""kill -9 during ingest and during rm: what was committed stays, and the rest never was.

The process dies just before the n-th change of the file system, for every n (every twelfth n,
counted from the last, in the quick versions), and at moments spread over its whole life besides.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lever_data.store.staging import sweep
from tests.torture.conftest import Report
from tests.torture.harness import (
    FULL,
    Nursery,
    Outcome,
    Snapshot,
    moments,
    verify,
    verify_checks,
    verify_swept,
    write_rl_data,
)

Command = Callable[..., Outcome]


class Room:
    """A store with one run in it, a command that is killed, and the undisturbed results."""

    def __init__(self, path: Path, nursery: Nursery, *, shuffled: bool, queries: int) -> None:
        self.store = path / "store"
        self.saved = path / "saved"
        self.nursery = nursery
        first = write_rl_data(path / "first.json", 40, seed=1)
        self.source = write_rl_data(path / "second.json", queries, seed=2, shuffled=shuffled)
        self._ingest(first)
        shutil.copytree(self.store, self.saved)
        self.before = verify(self.store)
        self.undisturbed = self.ingest()
        self.after = verify(self.store)
        self.views = (self.store / "views.sql").read_bytes()
        self.new = next(iter(self.after.keys() - self.before.keys()))

    def ingest(self, **kill: float | int) -> Outcome:
        return self._ingest(self.source, **kill)

    def remove(self, **kill: float | int) -> Outcome:
        return self._run("runs", "rm", self.new, "--store", self.store, **kill)

    def reset(self) -> None:
        """The store as it was before the command."""
        shutil.rmtree(self.store)
        shutil.copytree(self.saved, self.store)

    def _ingest(self, source: Path, **kill: float | int) -> Outcome:
        words = ("ingest", source, "--store", self.store, "--dataset", "d", "--split", "train")
        return self._run(*words, **kill)

    def _run(self, *words: str | Path, **kill: float | int) -> Outcome:
        outcome = self.nursery.run(*words, **kill)  # type: ignore[arg-type]
        assert outcome.killed or outcome.code == 0, outcome.stderr
        return outcome


KILLS = [  # keys out of order (they are sorted outside memory)?, every n-th change, moments
    pytest.param(True, 12, 1, id="quick"),
    pytest.param(True, 1, 300, id="long, shuffled", marks=FULL),
    pytest.param(False, 1, 300, id="long, in order", marks=FULL),
]


def _kills(command: Command, undisturbed: Outcome, step: int, spread: int) -> Iterator[Outcome]:
    """Run the command again and again, killed before changes and at moments spread over it."""
    assert undisturbed.changes is not None
    for number in range(undisturbed.changes, 0, -step):
        yield command(kill_before=number)
    for after in moments(spread, undisturbed.seconds, seed=undisturbed.changes):
        yield command(kill_after=after)


@pytest.mark.long
@pytest.mark.parametrize(("shuffled", "step", "spread"), KILLS)
def test_ingest_killed_at_any_moment(
    tmp_path: Path, nursery: Nursery, report: Report, shuffled: bool, step: int, spread: int
) -> None:
    room = Room(tmp_path, nursery, shuffled=shuffled, queries=2_000 if step == 1 else 400)
    seen: Counter[str] = Counter()
    room.reset()
    for outcome in _kills(room.ingest, room.undisturbed, step, spread):
        left = verify_checks(room.store)
        assert left in (room.before, room.after)
        seen["killed"] += outcome.killed
        seen["committed"] += outcome.killed and left == room.after
        assert room.ingest().code == 0
        assert verify(room.store) == room.after
        assert (room.store / "views.sql").read_bytes() == room.views
        sweep(room.store / "staging")
        verify_swept(room.store)
        room.reset()
    report(f"{seen['killed']} kills, {seen['committed']} of them after the commit")
    assert seen["killed"] > seen["committed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shuffled", "step", "spread"),
    [pytest.param(True, 12, 1, id="quick", marks=pytest.mark.long), KILLS[2]],
)
def test_rm_killed_at_any_moment(
    tmp_path: Path, nursery: Nursery, report: Report, shuffled: bool, step: int, spread: int
) -> None:
    room = Room(tmp_path, nursery, shuffled=shuffled, queries=200)
    seen: Counter[str] = Counter()
    undisturbed = room.remove()
    assert verify(room.store) == room.before
    again = partial(_remove_again, room)
    for outcome in _kills(again, undisturbed, step, spread):
        left = verify_checks(room.store)
        assert left in (room.before, room.after)
        seen["killed"] += outcome.killed
        seen["removed"] += outcome.killed and left == room.before
        _finish_removal(room, left)
        sweep(room.store / "staging")
        verify_swept(room.store)
    report(f"{seen['killed']} kills, {seen['removed']} of them after the removal")
    assert seen["killed"] > seen["removed"] > 0


def _remove_again(room: Room, **kill: float | int) -> Outcome:
    """Remove the run, which is put in place first."""
    assert room.ingest().code == 0
    return room.remove(**kill)


def _finish_removal(room: Room, left: Snapshot) -> None:
    if left == room.after:
        assert room.remove().code == 0
    assert verify(room.store) == room.before
