"""Are the files of a run still what was committed? Their sha256 against the manifest's.

Parquet readers do not notice most damage: of 200 single bits flipped in a candidates file, 166
changed what DuckDB 2.0 read without an error. So whoever computes a figure from a run has the files
hashed first, at about 1.5 GB/s a core; ten million candidates are 0.2 GB. What was hashed on this
machine and has not been touched since (``verified.py``) is not hashed again; ``lever check`` hashes
all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from lever_data.errors import LeverError
from lever_data.store.manifest import Run
from lever_data.store.mirror import Mirror
from lever_data.store.verified import HashMemory


def require_intact(runs: Sequence[Run], tables: Collection[str] | None = None) -> None:
    """Refuse runs whose files are not what was committed.

    Args:
        tables: only the files of these tables; all where ``None``.

    Raises:
        LeverError: the first file that is missing, unreadable or altered.
    """
    if not runs:
        return
    if (mirror := Mirror.of(runs[0].path.parents[1])) is not None:
        mirror.fetch(runs, tables)
    memory = HashMemory(runs[0].path.parent)
    files = [
        (run, name)
        for run in runs
        for name in sorted(run.files)
        if tables is None or name.split("/", 1)[0] in tables
    ]

    def fault(file: tuple[Run, str]) -> str | None:
        run, name = file
        try:
            is_intact = memory.is_intact(run.path / name, run.files[name])
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if is_intact else "is not what was committed"

    with ThreadPoolExecutor() as pool:
        for (run, name), found in zip(files, pool.map(fault, files), strict=True):
            if found is not None:
                if mirror is not None:
                    mirror.forget(run, name)
                raise _error(run, name, found, is_copy=mirror is not None)
    memory.remember()


def _error(run: Run, name: str, fault: str, *, is_copy: bool) -> LeverError:
    return LeverError(
        f"a file of run {run.run} {fault}",
        where=str(run.path / name),
        hint="it was a copy in the cache: the same command fetches it anew"
        if is_copy
        else f"name other runs with --run to go on without it; `lever runs rm {run.run}` removes "
        "it, then make it again; or restore the file from a copy",
    )
