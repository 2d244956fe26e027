"""llama.cpp's own C++ server of a model's file, from the wheel ``xllamacpp``: an endpoint that
nobody here wrote, with a real model on the CPU.

In goes a GGUF file, out comes the port it listens on; it ends with the block.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

STARTS = 180  # seconds a server may take to start on a crowded machine
_SERVER = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx = sys.argv[1], int(sys.argv[2]), 2048
params.cpuparams.n_threads = 1  # several wait for each other where cores are few
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@contextmanager
def serving_gguf(path: Path, model: str = "m") -> Iterator[int]:
    """The port of a server of this file."""
    port = free_port()
    with serving([sys.executable, "-c", _SERVER, str(path), str(port)], port, model):
        yield port


@contextmanager
def serving(command: list[str], port: int, model: str) -> Iterator[None]:
    """A server in a process of its own, once it answers for ``model``."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + STARTS
            while not _is_ready(port, model):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)
            yield
        finally:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(port: int, model: str) -> bool:
    """The smallest completion is answered: a server may listen while its model still loads."""
    asked = {"model": model, "prompt": "Hi", "max_tokens": 1}
    url = f"http://127.0.0.1:{port}/v1/completions"
    try:
        return httpx.post(url, json=asked, timeout=60).is_success
    except httpx.TransportError:
        return False
