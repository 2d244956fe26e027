"""The second process of an ingest: how it is started, and started early.

Standard library only: a command can start it first and import pyarrow meanwhile, as the process
itself does. It ends by itself when the other end of its socket closes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lever_data.sources.channel import Channel

LARGE = 24 << 20  # bytes of text from which on a second process pays for its start of 0.3 s


@dataclass(frozen=True)
class WorkerProcess:
    """A process that runs ``worker.py``, and the channel to it."""

    process: subprocess.Popen[bytes]
    channel: Channel


_early: list[WorkerProcess] = []  # started and not taken yet


def start_early(paths: Iterable[Path]) -> None:
    """Start the process that ``take`` gives out next, where one of the files will want it."""
    if has_core() and any(map(_is_large_json, paths)):
        _early.append(_start())


def take() -> WorkerProcess:
    """The process started early, else a new one."""
    return _early.pop() if _early else _start()


def has_core() -> bool:
    """Whether there is a second core for it."""
    return len(os.sched_getaffinity(0)) > 1


def _is_large_json(path: Path) -> bool:
    """A look only: what is wrong with the file is said by those who read it."""
    with suppress(OSError):
        if path.is_file() and path.stat().st_size >= LARGE:
            with path.open("rb") as file:
                return file.read(1) == b"{"
    return False


def _start() -> WorkerProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lever_data.sources.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return WorkerProcess(process, Channel(ours))
