"""What the torture rooms did (kills, inputs, disks), shown at the end of any run of the tests."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.torture.harness import Nursery

if TYPE_CHECKING:  # it imports torch, which most files of tests go without
    from tests.cloud import Cloud, TestBucket
    from tests.training import Bench

# All that sweep, train, generate and rescore import; torch imports _dynamo when an optimizer is
# made, which would take each child 1.4 s.
_MODULES = (
    *("lever_train.flow.sweep", "lever_train.rollout.generate", "lever_data.report.rescore"),
    *("lever_train.rollout.answerers.nearest", "polars", "torch._dynamo"),
)
# Nothing is judged by the clock: a busy machine draws and runs examples as slowly as it likes.
settings.register_profile("any_pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_pace")
# Or bindings would say at the end that they leak. Not sooner: pytest collects twice as it ends.
atexit.register(gc.unfreeze)
# A shell's background job ignores Ctrl-C, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """All that was imported stays: the collector need not look through torch at every turn."""
    gc.freeze()


def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What session fixtures have lever remember: not in the user's cache."""
    yield from _own_cache(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(
    _cache_of_the_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No file of tests finds what another had lever remember."""
    yield from _own_cache(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _commands_without_pandas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Arrow imports pandas wherever it is installed, 0.3 s of every command that a test starts."""
    absent = tmp_path_factory.mktemp("absent")
    (absent / "pandas.py").write_text("raise ImportError('absent from the commands of tests')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(absent), prepend=os.pathsep)
        yield


ROOM = "room"  # the property of a test's report that travels from its process to the summary


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """A nursery for the commands that train, generate and rescore."""
    with Nursery(tmp_path_factory.mktemp("nursery"), *_MODULES) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A training in ``out`` as ``Bench.train`` makes it by default; only read."""
    from tests.training import Bench

    bench = Bench(tmp_path_factory.mktemp("finished"))
    bench.train()
    return bench


@pytest.fixture
def trained(finished: Bench, tmp_path: Path) -> Bench:
    """A copy of the finished training, to be changed."""
    return finished.copy(tmp_path)


@dataclass(frozen=True)
class DemoDone:
    """A small demo whose pipeline has run, only read; what the command said, and what the same in
    Python said after it."""

    folder: Path
    stdout: str
    stderr: str
    again: list[str]


@pytest.fixture(scope="session")
def demo_done(tmp_path_factory: pytest.TempPathFactory) -> DemoDone:
    """Made once for all processes of tests."""
    from lever_demo.demo import DemoOptions, run_demo
    from lever_demo.world import WorldSpec
    from tests.commands import lever

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folders lie beside each other
        common = common.parent
    folder, said = common / "demo", common / "demo.json"
    with FileLock(common / "demo.lock"):
        if not said.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            done, again = lever("demo", "--out", folder, "--questions", 120), list[str]()
            run_demo(DemoOptions(folder, WorldSpec(train=120, held_out=40), say=again.append))
            said.write_text(json.dumps([done.stdout, done.stderr, again]))
    return DemoDone(folder, *json.loads(said.read_text()))


@pytest.fixture(scope="session")
def cloud() -> Iterator[Cloud]:
    """An S3 server on loopback."""
    from tests.cloud import Cloud

    with Cloud() as cloud:
        yield cloud


@pytest.fixture
def bucket(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestBucket:
    """An empty bucket, and a machine that can reach it and has nothing cached."""
    from tests.cloud import environment, new_bucket

    for name, value in environment(cloud).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "machine"))
    return new_bucket(cloud)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for rs in terminalreporter.stats.values() for r in rs]
    said = [
        value
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for key, value in report.user_properties
        if key == ROOM
    ]
    if said:
        terminalreporter.section("torture rooms")
        for line in said:
            terminalreporter.write_line(str(line))
