"""Paths that are none: addresses of object stores and servers."""

from __future__ import annotations

import re
from pathlib import Path

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")


def uri_scheme(path: str | Path) -> str | None:
    """``s3`` of ``s3://bucket/file``, which ``Path`` writes as ``s3:/bucket/file`` and every call
    of the system would take for a local folder; ``None`` of a path."""
    found = _URI.match(str(path))
    return None if found is None else found[1].lower()
