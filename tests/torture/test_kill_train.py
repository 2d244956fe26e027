"""kill -9 during train: going on ends with the weights, metrics and run of an undisturbed one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.torture.conftest import Report
from tests.torture.harness import (
    LONG_SIZES,
    Nursery,
    Outcome,
    Snapshot,
    verify,
    verify_checks,
)
from tests.training import Bench

PHASES = ("rce_epoch1", "rce_epoch2", "grpo_epoch3")


class Room:
    """A store, the training of it, and what it ends with when nobody disturbs it."""

    def __init__(self, folder: Path, warm: Nursery) -> None:
        self.warm = warm
        self.out = folder / "out"
        self.bench = Bench(folder)
        self.before = verify(self.bench.store.path)
        self.undisturbed = self.train()
        assert self.undisturbed.code == 0, self.undisturbed.stderr
        self.after = verify(self.bench.store.path)
        self.result = self.files()
        self.forget()

    def train(self, **kill: float | int) -> Outcome:
        """Start, or go on where there is a state; what lies there without one is replaced."""
        words = ["train", "--store", self.bench.store.path, "--out", self.out, "--threads", 1]
        for name, value in self.bench.flags(grpo_epochs=1, save_every=3).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += ["--resume" if (self.out / "state.pt").exists() else "--overwrite"]
        return self.warm.run(*map(str, words), **kill)  # type: ignore[arg-type]

    def files(self) -> dict[str, object]:
        """The tensors of every checkpoint, bit for bit, and the bytes of the metrics."""
        found: dict[str, object] = {
            path.name: {
                name: tensor.numpy().tobytes()
                for name, tensor in torch.load(path)["model_state_dict"].items()
            }
            for path in sorted(self.out.glob("*_epoch*.pt"))
        }
        return found | {
            "metrics": (self.out / "metrics.parquet").read_bytes(),
            "last": (self.out / "last.pt").readlink(),
            "best": (self.out / "best.pt").readlink(),
        }

    def left(self) -> Snapshot:
        """What is committed: the data, and the training's metrics or not."""
        found = verify_checks(self.bench.store.path)
        assert found in (self.before, self.after)
        return found

    def forget(self) -> None:
        """Back to before the training."""
        shutil.rmtree(self.out, ignore_errors=True)
        for run in self.after.keys() - self.before.keys():
            if run in verify(self.bench.store.path):
                self.bench.store.remove(run)

    def finish(self) -> None:
        """Go on undisturbed; the end must be the same."""
        outcome = self.train()
        assert outcome.code == 0, outcome.stderr
        assert self.files() == self.result
        assert self.left() == self.after
        assert not [p.name for p in self.out.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def room(warm: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Room:
    """As before the training; every test leaves it so."""
    return Room(tmp_path_factory.mktemp("train"), warm)


@pytest.mark.slow
@pytest.mark.parametrize("long", LONG_SIZES)
def test_train_killed_before_changes_of_the_file_system(
    room: Room, report: Report, long: bool
) -> None:
    assert room.undisturbed.changes is not None
    moments = range(1, room.undisturbed.changes + 1)
    middle = len(moments) // 2
    moments = moments if long else moments[middle : middle + 1]
    for number in moments:
        assert room.train(kill_before=number).killed
        room.left()
        room.finish()
        room.forget()
    report(f"{len(moments)} of {room.undisturbed.changes} changes")


@pytest.mark.slow
@pytest.mark.parametrize("long", LONG_SIZES)
def test_train_killed_again_and_again(room: Room, report: Report, long: bool) -> None:
    roll = random.Random(0)
    kills = trainings = 0
    while kills < (150 if long else 1):
        outcome = room.train(kill_after=roll.uniform(0, room.undisturbed.seconds))
        room.left()
        kills += outcome.killed
        if not outcome.killed:
            room.finish()
            room.forget()
            trainings += 1
    room.finish()
    room.forget()
    report(f"{kills} kills over {trainings + 1} trainings")
