"""Resuming: after a kill at any moment, after Ctrl-C, and never into another training."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_train.learn.folder import TrainingFolder
from lever_train.learn.state import STATE
from tests.cases import long
from tests.training import Bench, equal

GRPO: dict[str, Any] = {
    "rce_epochs": 2,
    "grpo_epochs": 1,
    "grpo_lr": 1e-3,
    "save_every": 1,
    "batch_size": 4,
}
Whole = Callable[[str], Bench]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """By the selector's kind, a training in both stages that nobody kills; only read."""

    @functools.cache
    def train(selector: str) -> Bench:
        bench = Bench(tmp_path_factory.mktemp(selector))
        bench.train(**GRPO | {"selector": selector})
        return bench

    return train


class _StopError(Exception):
    """Raised in place of a kill."""


def _train_and_die(bench: Bench, out: str, after: int, **flags: Any) -> None:
    """Die after ``after`` steps without any chance to clean up the state."""
    left = [after]

    def advance(done: float, total: float | None, note: str = "") -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _StopError

    with pytest.raises(_StopError):
        bench.train(out, advance=advance, **flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selector", "after", "save_every"),
    [
        ("gru", 9, 2),
        *(long("static", 3, 1), long("static", 22, 3), long("static", 17, 4)),
    ],
)
def test_a_killed_training_ends_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path, selector: str, after: int, save_every: int
) -> None:
    bench = Bench(tmp_path)
    flags: dict[str, Any] = GRPO | {"selector": selector}
    _train_and_die(bench, "killed", after, **flags | {"save_every": save_every})
    bench.train("killed", resume=True, **flags)
    assert any(line.startswith("resuming at") for line in bench.said)
    undisturbed = whole(selector)
    for name in ("rce_epoch1.pt", "rce_epoch2.pt", "grpo_epoch1.pt"):
        assert equal(undisturbed.tensors("out", name), bench.tensors("killed", name)), name
    assert undisturbed.metrics().equals(bench.metrics("killed"))
    assert (undisturbed.folder / "out" / "best.pt").readlink() == (
        tmp_path / "killed" / "best.pt"
    ).readlink()


@pytest.mark.long
@pytest.mark.parametrize("left", [(STATE,), long((STATE, "config.toml"))])
def test_killed_before_its_first_step_it_starts_from_the_beginning(
    finished: Bench, tmp_path: Path, left: tuple[str, ...]
) -> None:
    bench = Bench(tmp_path)
    _train_and_die(bench, "killed", 0)
    for path in (tmp_path / "killed").iterdir():
        if path.name not in left:
            path.unlink()
    with pytest.raises(LeverError, match=r"\[run\] seed was '0', now it is '1'"):
        bench.train("killed", resume=True, seed=1)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == set(left)
    bench.train("killed", resume=True)
    assert "resuming at phase 1, epoch 1, step 0" in bench.said
    assert equal(finished.tensors("out"), bench.tensors("killed"))
    assert finished.metrics().equals(bench.metrics("killed"))


@pytest.mark.long
def test_resuming_nothing_makes_nothing(trained: Bench, tmp_path: Path) -> None:
    bench = trained
    with pytest.raises(LeverError, match="no training here to resume"):
        bench.train("nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "out" / STATE).unlink()  # its checkpoints are not to be taken for a beginning
    with pytest.raises(LeverError, match="no training here to resume") as error:
        bench.train(resume=True)
    assert "--overwrite" in str(error.value.hint)


@pytest.mark.long
def test_it_can_die_again_and_again(whole: Whole, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    _train_and_die(bench, "killed", 2, **GRPO)
    for after in (0, 4):
        _train_and_die(bench, "killed", after, resume=True, **GRPO)
    bench.train("killed", resume=True, **GRPO)
    assert equal(whole("static").tensors("out"), bench.tensors("killed"))
    assert whole("static").metrics().equals(bench.metrics("killed"))


@pytest.mark.long
def test_resuming_what_is_finished_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.train()
    before = (tmp_path / "out" / "rce_epoch2.pt").read_bytes()
    again = bench.train(resume=True)
    assert again.epochs == first.epochs and again.last == first.last
    assert (tmp_path / "out" / "rce_epoch2.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": 1}, r"\[run\] seed was '0', now it is '1'"),
        long({"rce_epochs": 3}, r"\[rce\] epochs was '2', now it is '3'"),
        long({"gen_method": ["beam", "sample"]}, r"\[data\] gen_method was"),
        long({"hard_weight": 2.0}, r"\[reward\] hard_weight was '1.0', now it is '2.0'"),
    ],
)
def test_another_config_is_refused(trained: Bench, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(LeverError, match=message):
        trained.train(resume=True, **flags)


@pytest.mark.long
def test_another_number_of_threads_is_refused(tmp_path: Path) -> None:
    """They sum in another order: the ending would be close, not the same."""
    bench = Bench(tmp_path)
    # without the option: what counts is the number in effect
    _train_and_die(bench, "out", 4)
    before = torch.get_num_threads()
    try:
        with pytest.raises(LeverError, match=r"\[run\] threads was '1', now it is '2'") as error:
            bench.train(resume=True, threads=before + 1)
    finally:
        torch.set_num_threads(before)
    assert str(error.value.hint).startswith("--threads 1 goes on")
    bench.train(resume=True, threads=1)


@pytest.mark.long
def test_another_number_of_processes_is_refused_with_the_way_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    _train_and_die(bench, "out", 4)
    state = torch.load(tmp_path / "out" / STATE, weights_only=True)
    state["fingerprint"]["processes"] = "4"
    torch.save(state, tmp_path / "out" / STATE)
    with pytest.raises(LeverError, match="processes was '4', now it is '1'") as error:
        bench.train(resume=True)
    assert "torchrun --nproc-per-node 4" in str(error.value.hint)


@pytest.mark.long
@pytest.mark.parametrize("begun", [True, False])
def test_where_nothing_is_left_to_sum_or_nothing_was_any_number_will_do(
    finished: Bench, tmp_path: Path, begun: bool
) -> None:
    bench = finished.copy(tmp_path) if begun else Bench(tmp_path)
    if not begun:
        _train_and_die(bench, "out", 0)
    state = torch.load(tmp_path / "out" / STATE, weights_only=True)
    state["fingerprint"] |= {"processes": "4", "[run] threads": "8"}
    torch.save(state, tmp_path / "out" / STATE)
    bench.train(resume=True)
    assert equal(finished.tensors("out"), bench.tensors("out"))


@pytest.mark.long
def test_other_vectors_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    _train_and_die(bench, "out", 0)
    torch.save(torch.randn(40, 6), bench.vectors)
    with pytest.raises(LeverError, match=r"sha256 of the (queries|candidates)' vectors was"):
        bench.train(resume=True)


@pytest.mark.long
def test_another_pool_in_the_same_file_is_refused(tmp_path: Path) -> None:
    """The same name and as many candidates: what is in it counts."""
    bench = Bench(tmp_path)
    pool = tmp_path / "pool.npy"
    np.save(pool, np.tile([*range(12), 30], (40, 1)))
    bench.train(pool=str(pool), rce_epochs=1)
    bench.train(pool=str(pool), resume=True, rce_epochs=1)
    np.save(pool, np.tile([*range(12), 31], (40, 1)))
    with pytest.raises(LeverError, match="pool_sha256 was"):
        bench.train(pool=str(pool), resume=True, rce_epochs=1)


@pytest.mark.long
def test_another_view_below_the_one_trained_on_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    views = bench.store.path / "views"
    views.mkdir()
    (views / "below.sql").write_text("select * from all_candidates")
    (views / "mine.sql").write_text("select * from below")
    (views / "unread.sql").write_text("select 1 as one")
    bench.train(view=["mine"], rce_epochs=1)
    (views / "unread.sql").write_text("select 2 as two")
    bench.train(view=["mine"], resume=True, rce_epochs=1)
    changed = "select * replace (1 - correct as correct) from all_candidates"
    (views / "below.sql").write_text(changed)
    with pytest.raises(LeverError, match="views was"):
        bench.train(view=["mine"], resume=True, rce_epochs=1)


@pytest.mark.long
def test_another_version_and_a_broken_state_are_refused(trained: Bench, tmp_path: Path) -> None:
    bench = trained
    state = torch.load(tmp_path / "out" / STATE, weights_only=True)
    torch.save(state | {"version": 99}, tmp_path / "out" / STATE)
    with pytest.raises(LeverError, match="is of version 99, this lever reads 2"):
        bench.train(resume=True)
    (tmp_path / "out" / STATE).write_bytes(b"half a fi")
    with pytest.raises(LeverError, match="the state cannot be read"):
        bench.train(resume=True)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Bench(tmp_path).train(resume=True, overwrite=True)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sign", "code"),
    # kill -9 at any change of the file system: tests/torture/test_kill_train.py
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long)],
)
def test_the_command_survives_a_signal(tmp_path: Path, sign: signal.Signals, code: int) -> None:
    """The real process: stopped somewhere in the middle, resumed, equal to an uninterrupted one.

    While it lives, nobody else may write its folder.
    """
    bench, out = Bench(tmp_path), tmp_path / "killed"
    flags: dict[str, Any] = {"rce_epochs": 5, "save_every": 5, "threads": 1}
    bench.train("whole", **flags)
    words = [sys.executable, "-m", "lever_cli", "train", "--store", bench.store.path, "--out", out]
    for name, value in bench.flags(**flags).items():
        words += [f"--{name.replace('_', '-')}", value]
    pipe = subprocess.PIPE
    with subprocess.Popen([*map(str, words)], stderr=pipe, stdout=pipe) as process:
        while process.poll() is None and not (out / "rce_epoch1.pt").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # it has little left to do
        with pytest.raises(LeverError, match="another training writes --out at this moment"):
            TrainingFolder(out).check(resume=True, overwrite=False)
        process.send_signal(sign)
        process.send_signal(signal.SIGCONT)
        stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, stderr
    if sign == signal.SIGINT:
        assert "--resume goes on from there" in stderr and "Traceback" not in stderr
    assert not (out / "rce_epoch5.pt").exists()
    bench.train("killed", resume=True, **flags)
    assert equal(bench.tensors("whole"), bench.tensors("killed"))
    assert bench.metrics("whole").equals(bench.metrics("killed"))


@pytest.mark.long
def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Bench(tmp_path).train(rce_epochs=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
