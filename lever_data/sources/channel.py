"""Messages to and from a process of our own: an object, and bytes that are copied once each way.

``multiprocessing.connection`` copies what it receives three times more and takes longer to import.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
from typing import Any

_SIZES = struct.Struct("<QQ")


class Channel:
    """One end of a socket between two processes that trust each other (objects are pickled)."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, value: object, *parts: bytes | memoryview) -> None:
        """Send an object and, one after another, the bytes of ``parts``; waits while it is read.

        Raises:
            OSError: the other side has hung up.
        """
        packed = pickle.dumps(value)
        views = [memoryview(part) for part in parts]
        self._socket.sendall(_SIZES.pack(len(packed), sum(view.nbytes for view in views)) + packed)
        for view in views:
            self._socket.sendall(view)

    def receive(self) -> tuple[Any, bytes]:
        """The next message: its object, and its parts as one.

        Raises:
            EOFError: the other side has hung up, be it within a message.
            OSError: it ended with something unread.
        """
        packed, size = _SIZES.unpack(self._exactly(_SIZES.size))
        return pickle.loads(self._exactly(packed)), self._exactly(size)

    def has_message(self, seconds: float) -> bool:
        """Whether there is something to receive, or will be so soon."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            part = self._socket.recv(size, socket.MSG_WAITALL)  # all at once, as a rule
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
