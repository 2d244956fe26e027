"""Room for the mirrors of stores in buckets: what is read stays, the rest goes when room is short.

In go the runs that a process reads and the bytes that it needs; runs that no live process reads are
evicted, those first that were read longest ago.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from lever_data.errors import LeverError
from lever_data.paths import SIZE, cache_size, mirrors
from lever_data.store.locks import Lock, is_held

IMAGES = "images"  # folder of the pictures that came inside data sets
OBJECTS = "objects.json"  # what the bucket said of a run; touched when it is read


class _Reader:
    """What this process reads of one mirror: a file that names it, locked while we live."""

    def __init__(self, mirror: Path) -> None:
        self.process = os.getpid()
        self.path = mirror / "readers" / uuid.uuid4().hex
        self.names: set[str] = set()
        self._lock = Lock(self.path)
        self._lock.take()

    def add(self, names: set[str], *, alone: bool) -> None:
        """Add runs, or hold these alone."""
        self.names = names if alone else self.names | names
        self.path.write_text("\n".join(sorted(self.names)))


_readers: dict[Path, _Reader] = {}


def hold(mirror: Path, names: set[str], *, alone: bool = False) -> None:
    """Keep runs from eviction until this process ends; the caller holds the lock of the mirrors."""
    reader = _readers.get(mirror)
    if reader is None or reader.process != os.getpid() or not reader.path.exists():
        _readers[mirror] = _Reader(mirror)
    _readers[mirror].add(names, alone=alone)


def make_room(need: int) -> None:
    """Evict the runs that were read longest ago until so many bytes fit; the caller holds the lock.

    Raises:
        LeverError: they do not fit beside what live processes read.
    """
    limit = cache_size()
    here: dict[Path, int] = {}
    kept: set[Path] = set()
    for run in mirrors().glob("**/.store/runs/run=*"):
        here[run] = sum(file.stat().st_size for file in run.glob("*/*.parquet*"))
    for reader in mirrors().glob("**/.store/readers/*"):
        if is_held(reader):
            kept |= {reader.parents[1] / "runs" / name for name in reader.read_text().split()}
        else:
            reader.unlink()
    pictures = sum(file.stat().st_size for file in mirrors().glob(f"**/.store/{IMAGES}/*"))
    used = sum(here.values()) + pictures
    for run in sorted(here.keys() - kept, key=lambda r: (_last_read(r), r)):
        if used + need <= limit:
            return
        for file in run.glob("*/*.parquet*"):
            file.unlink()
        used -= here[run]
    if used + need > limit:
        raise LeverError(
            f"what is read does not fit into the cache: {(used + need) / 1e9:.3f} GB, "
            f"and {SIZE} is {limit / 1e9:.3f} GB",
            where=str(mirrors()),
            hint=f"{SIZE}=100GB lever …, LEVER_CACHE names a folder on a larger disk, or read "
            "fewer runs (--run)",
        )


def _last_read(run: Path) -> float:
    try:
        return (run / OBJECTS).stat().st_mtime
    except FileNotFoundError:
        return 0.0
