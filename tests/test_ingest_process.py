"""The processes of an ingest: what they do not import, and when the second is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest

from lever_data.sources import process
from lever_data.sources.channel import Channel
from lever_data.sources.layout import Built
from lever_data.sources.process import WorkerProcess, start_early, take
from lever_data.sources.rl_ingest import _write_all
from lever_data.store.store import RunWriter
from tests.torture.harness import write_rl_data


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
    worker.channel.close()
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
        assert worker.channel.receive() == (True, b""), "it says when it is ready"
        end(worker)


@pytest.mark.parametrize("content", [b"{", b"\x93NUMPY" + b" " * 100, b"\x1f\x8b" + b" " * 100])
def test_what_needs_none_or_may_not_starts_none(
    tmp_path: Path, started: list[WorkerProcess], content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    start_early([path, tmp_path, Path("--name"), Path("\0"), Path("long" * 2000)])
    assert started == []


def test_on_one_core_none_is_started(
    tmp_path: Path, started: list[WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_core", lambda: False)
    path = tmp_path / "rl_data.json"
    path.write_text("{" + " " * 100)
    start_early([path])
    assert started == []


def test_pandas_stays_out_of_both_processes(tmp_path: Path) -> None:
    fake = tmp_path / "lib" / "pandas"
    fake.mkdir(parents=True)
    marker = tmp_path / "imported"
    (fake / "__init__.py").write_text(
        f"import sys, traceback\n"
        f"open({str(marker)!r}, 'a').write(''.join(traceback.format_stack()))\n"
    )
    source = write_rl_data(tmp_path / "a.json", 3_000)
    words = ["ingest", str(source), "--store", str(tmp_path / "s")]
    code = (
        "import sys, lever_data.sources.process as process, lever_data.sources.helper as helper\n"
        "process.LARGE, helper.START_WAIT = 1, 60\n"
        "from lever_data.sources import rl_ingest; rl_ingest.LARGE = 1\n"
        "from lever_cli.__main__ import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists(), marker.read_text()


def test_it_is_started_before_the_command_line_is_imported() -> None:
    code = (
        "import sys, lever_data.sources.process as process\n"
        "def start_early(paths): sys.exit(f'{[*map(str, paths)]} {\"typer\" in sys.modules}')\n"
        "process.start_early = start_early\n"
        "from lever_cli.__main__ import main; main(['--debug', 'ingest', 'a.json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "['--debug', 'ingest', 'a.json'] False"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_of_any_size_arrive_whole_and_in_order(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = map(Channel, ends)
    text = os.urandom(5 << 20)
    assert not here.has_message(0)

    def send() -> None:
        there.send({"a": 1}, text[:1000], memoryview(text)[1000:])
        there.send(None)
        there.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert here.has_message(10)
    assert here.receive() == ({"a": 1}, text)
    assert here.receive() == (None, b"")
    with pytest.raises(EOFError):
        here.receive()
    assert here.has_message(0), "the end is something to receive"
    sender.join()


def test_a_message_cut_short_is_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    Channel(there).send("value", b"text")
    whole = here.recv(1000)
    there.sendall(whole[:-1])
    there.close()
    with pytest.raises(EOFError):
        Channel(here).receive()


class _Full:
    """A writer without memory."""

    def write(self, *_: object) -> None:
        raise MemoryError("full")


def test_a_writer_that_fails_in_any_way_ends_the_ingest() -> None:
    empty = pa.RecordBatch.from_pylist([], pa.schema([]))
    with pytest.raises(MemoryError, match="full"):
        _write_all(cast(RunWriter, _Full()), [Built(empty, empty, 0)] * 100)
