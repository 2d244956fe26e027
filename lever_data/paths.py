"""Where things lie: addresses that are no paths, the user's cache folder, mirrors of buckets.

A store in a bucket, ``s3://bucket/prefix``, is read through its mirror, a folder of the cache that
is named by the address: ``<cache>/mirror/s3/bucket/prefix/.store``. So either can stand for the
other wherever a store is named, and a path is all that the rest of lever passes on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lever_data.errors import UsageError

REMOTE = ("s3", "gs", "az", "hf")  # schemes of what is no file system and may hold a store
SIZE, _DEFAULT_SIZE = "LEVER_CACHE_SIZE", "20GB"
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")
_BUCKET = re.compile(r"[a-zA-Z0-9]+:/+([a-zA-Z0-9][a-zA-Z0-9._-]*)((?:/[^/?#@\0]+)*)/*")
_LEAF = ".store"  # no prefix of another store ends so, and a store may lie inside another's prefix


def uri_scheme(path: str | Path) -> str | None:
    """``s3`` of ``s3://bucket/file``, which ``Path`` writes as ``s3:/bucket/file`` and every call
    of the system would take for a local folder; ``None`` of a path."""
    found = _URI.match(str(path))
    return None if found is None else found[1].lower()


def cache_folder() -> Path:
    """Where lever keeps what it can have again: LEVER_CACHE, else ``lever`` in the user's cache."""
    if own := os.environ.get("LEVER_CACHE"):
        return Path(own).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").resolve() / "lever"


def cache_size() -> int:
    """Bytes that all mirrors together may take, and all snapshots together.

    Raises:
        UsageError: LEVER_CACHE_SIZE is no size.
    """
    text = os.environ.get(SIZE, _DEFAULT_SIZE)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", text)
    if found is None:
        raise UsageError(f"{SIZE} is not a size such as 20GB", value=text)
    return int(float(found[1]) * _UNITS[found[2]])


def mirrors() -> Path:
    """The folder of all mirrors."""
    return cache_folder() / "mirror"


def store_path(store: str | Path) -> Path:
    """The folder of a store: of a bucket's address its mirror, else the path itself.

    Raises:
        UsageError: an address that cannot be one. It is not shown: somebody may have written a
            password into it.
    """
    scheme = uri_scheme(store)
    if scheme not in REMOTE:
        return Path(store)
    found = _BUCKET.fullmatch(str(store))
    words = found[2].split("/")[1:] if found else []
    is_data_set = found is not None and found[1] == "datasets" and len(words) >= 2
    if found is None or {".", "..", _LEAF} & set(words) or (scheme == "hf" and not is_data_set):
        form = "hf://datasets/ORG/NAME" if scheme == "hf" else f"{scheme}://BUCKET/PREFIX"
        raise UsageError(
            f"this is not the address of a store in a bucket ({form})",
            hint="credentials come from the environment or the files of the cloud's own tools",
        )
    return mirrors().joinpath(scheme, found[1], *words, _LEAF)


def store_uri(path: Path) -> str | None:
    """The address of the store whose mirror the folder is; ``None`` where it is no mirror."""
    if path.name != _LEAF or not (place := path.resolve()).is_relative_to(mirrors()):
        return None
    scheme, *words = place.parent.relative_to(mirrors()).parts
    return f"{scheme}://{'/'.join(words)}"


def store_name(path: Path) -> str:
    """A store as its user names it: the bucket's address where the folder is a mirror."""
    return store_uri(path) or str(path)
