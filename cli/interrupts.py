"""Ctrl-C at any moment: whether it came, whoever swallowed or renamed it.

DuckDB, polars and interrupted imports raise errors of their own in place of KeyboardInterrupt.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn


class Interrupts:
    """Notes that an interrupt came, beside raising it as Python does."""

    seen = False

    def watch(self) -> None:
        """Begin; a handler that somebody else set stays."""
        self.seen = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> NoReturn:
        self.seen = True
        raise KeyboardInterrupt


interrupts = Interrupts()
