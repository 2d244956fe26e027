"""A warm process that runs `lever` commands in forked children, so that hundreds can be killed.

In go requests, one JSON object a line on stdin; out comes one reply a line on stdout. A child is a
session of its own and is killed whole with SIGKILL: after a delay, or just before the n-th change
of the file system that Python code asks for (audit events: open for writing, rename, remove,
mkdir, rmdir). Counting those enumerates every state a crash between two steps can leave behind.

    python -m tests.torture.nursery MODULE…      modules to import before the first fork
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    for name in ["lever_cli.app", *sys.argv[1:]]:
        importlib.import_module(name)
    gc.freeze()  # or a child's collector would look at all of torch, and copy its pages
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
    os._exit(0)  # taking torch apart would take seconds


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _live(request)
    status = _wait(pid, start, request)
    seconds = time.monotonic() - start
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return {"killed": killed, "code": code, "seconds": seconds}


def _wait(pid: int, start: float, request: dict[str, Any]) -> int:
    """The child's exit status; its whole session is killed when its time has come."""
    limit = request["kill_after"]
    left = start + (request["timeout"] if limit is None else limit) - time.monotonic()
    ended = os.pidfd_open(pid)
    try:
        if not select.select([ended], [], [], max(left, 0))[0]:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to setsid yet
        os.kill(pid, signal.SIGKILL)
    finally:
        os.close(ended)
    return os.waitpid(pid, 0)[1]


def _live(request: dict[str, Any]) -> NoReturn:
    """The child: its output goes to files, its changes are counted, it never returns."""
    os.setsid()
    for number, key in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    changes = _count_changes(request["kill_before"])
    from lever_cli.__main__ import main as lever

    code = 70  # an error that lever did not catch
    try:
        lever(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:  # noqa: BLE001 - shown to the test, which fails on it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if request["file_limit"] is None:
        Path(request["stdout"] + ".changes").write_text(str(changes[0]), "ascii")
    os._exit(code)


def _count_changes(kill_before: int | None) -> list[int]:
    """Count changes of the file system from here on; die before number ``kill_before``."""
    changes = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_change(event, args):
            changes[0] += 1
            if changes[0] == kill_before:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    return changes


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event changes the file system."""
    if event == "open":
        return isinstance(args[2], int) and bool(args[2] & _WRITES)
    return event in _CHANGES


if __name__ == "__main__":
    main()
