"""The second process of an ingest: when it is started before it is wanted, and who gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lever_data.legacy import process
from lever_data.legacy.process import WorkerProcess, start_early, take


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WorkerProcess]]:
    """The processes started early in a test; they end with it."""
    monkeypatch.setattr(process, "LARGE", 100)
    monkeypatch.setattr(process, "has_core", lambda: True)
    found: list[WorkerProcess] = []
    monkeypatch.setattr(process, "_early", found)
    yield found
    for worker in found:
        end(worker)


def end(worker: WorkerProcess) -> None:
    worker.connection.close()
    assert worker.process.wait(30) == 0, "it ends by itself when its socket closes"


def test_a_large_json_file_starts_it_and_the_first_who_asks_gets_it(
    tmp_path: Path, started: list[WorkerProcess]
) -> None:
    path = tmp_path / "rl_data.json"
    path.write_text("{" + " " * 100)
    start_early([tmp_path / "missing.json", path])
    (early,) = started
    assert take() is early
    other = take()
    assert other.process.pid != early.process.pid
    for worker in (early, other):
        assert worker.connection.recv() is True, "it says when it is ready"
        end(worker)


@pytest.mark.parametrize("content", [b"{", b"\x93NUMPY" + b" " * 100, b"\x1f\x8b" + b" " * 100])
def test_what_needs_none_or_may_not_starts_none(
    tmp_path: Path, started: list[WorkerProcess], content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    start_early([path, tmp_path])
    assert started == []


def test_on_one_core_none_is_started(
    tmp_path: Path, started: list[WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_core", lambda: False)
    path = tmp_path / "rl_data.json"
    path.write_text("{" + " " * 100)
    start_early([path])
    assert started == []
