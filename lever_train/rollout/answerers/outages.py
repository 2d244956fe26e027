"""Since when nobody listens at an endpoint, told from before torch was imported: those seconds are
a part of the patience that a job has with it.
"""

from __future__ import annotations

import socket
from time import monotonic
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_LONGEST = 1.0  # seconds that a connection may take here; who is slower is asked in earnest later
_silent: dict[str, float] = {}  # by URL


def knock(answerer: str) -> None:
    """Connect to the endpoint of ``openai:URL``, and note the time where nobody opens. A URL that
    is none is refused by whoever reads it."""
    kind, _, url = answerer.partition(":")
    if kind != "openai":
        return
    try:
        parts = urlsplit(url)
        address = (parts.hostname, parts.port or _PORTS.get(parts.scheme, 0))
        socket.create_connection(address, _LONGEST).close()
    except (OSError, ValueError):
        _silent[url.rstrip("/")] = monotonic()


def silent_since(url: str) -> float | None:
    """When :func:`knock` found nobody at ``url`` (:func:`time.monotonic`). Told once: from then on
    whoever asks keeps the time."""
    return _silent.pop(url, None)
