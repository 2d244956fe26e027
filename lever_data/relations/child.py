"""The process that runs a SELECT (``sandbox.py``): how it is started, and ended.

Light: the command line starts one before its own imports, so that on two cores both import at the
same time.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress

Child = subprocess.Popen[bytes]
_ahead: list[Child] = []  # started, and not asked for yet


def start() -> Child:
    """One that waits for its request: the one that was started ahead, or else a new one.

    It ends by itself when its stdin is closed, and so when this process ends.
    """
    if _ahead:
        return _ahead.pop()
    # an interrupt is held back until it has said how it takes one: Python's own start would take
    # it with a traceback
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lever_data.relations.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_ahead() -> None:
    """Start one for the :func:`start` to come. It has the environment of now."""
    _ahead.append(start())


def end(child: Child) -> None:
    """End it, whatever it does."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


def end_ahead() -> None:
    """End the one that was started ahead and that nobody asked for."""
    while _ahead:
        end(_ahead.pop())
