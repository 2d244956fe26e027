"""Ctrl-C at any moment: whether it came, whoever swallowed or renamed it.

DuckDB, polars and interrupted imports raise errors of their own in place of KeyboardInterrupt, and
torch, while it is imported, ends the process by SIGABRT.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


class Interrupts:
    """Notes that an interrupt came, beside raising it as Python does."""

    seen = False
    is_process = False  # this process is a command of its own, and may end at any moment

    def watch(self) -> None:
        """Begin; a handler that somebody else set stays."""
        self.seen = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> NoReturn:
        self.seen = True
        if self.is_process and _imports(frame):
            os.write(2, b"Error: interrupted\n")
            os._exit(130)
        raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way: what was finished before is kept, no more can be lost."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


interrupts = Interrupts()
