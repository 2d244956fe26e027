"""What was verified on this machine before: files whose bytes had the manifest's sha256.

In go paths and digests; out comes whether a file still is, by all that the operating system says of
it (device, inode, size, times of change), the one that was hashed. The memory lies in the user's
cache folder, a file a store, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from lever_data.paths import cache_folder
from lever_data.store.files import discard, sha256_file

FULL = "LEVER_VERIFY"  # environment variable: with "full" nothing remembered counts
_SETTLED = 2_000_000_000  # ns a file is left alone before its times can be trusted to tell changes

Stamp = list[int]


class HashMemory:
    """The memory for the files of one store; many threads may ask it at once."""

    def __init__(self, store: Path) -> None:
        name = hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:32]
        self._file = cache_folder() / "verified" / f"{name}.json"
        self._known: dict[str, tuple[Stamp, str]] = {}
        self._fresh: dict[str, tuple[Stamp, str]] = {}
        if os.environ.get(FULL) != "full":
            # none yet, or not what was written here: hash anew
            with suppress(OSError, ValueError, TypeError, AttributeError):
                found = json.loads(self._file.read_bytes())
                self._known = {path: (stamp, digest) for path, (stamp, digest) in found.items()}

    def is_intact(self, path: Path, digest: str) -> bool:
        """Whether the file has this sha256.

        Raises:
            OSError: it is not there or cannot be read.
        """
        stamp = _stamp(path)
        if self._known.get(str(path)) == (stamp, digest):
            return True
        if sha256_file(path) != digest:
            return False
        if _stamp(path) == stamp and time.time_ns() - max(stamp[3:]) > _SETTLED:
            self._fresh[str(path)] = (stamp, digest)
        return True

    def remember(self) -> None:
        """Keep what was verified for the next command; of files that are gone nothing is kept."""
        if not self._fresh:
            return
        kept = {path: found for path, found in self._known.items() if Path(path).exists()}
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with suppress(OSError):  # a cache that cannot be written only costs time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept | self._fresh))
            temporary.replace(self._file)
        discard(temporary)


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
