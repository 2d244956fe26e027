"""Are the files of a run still what was committed? Their sha256 against the manifest's.

Parquet readers do not notice most damage: of 200 single bits flipped in a candidates file, 166
changed what DuckDB 2.0 read without an error. So whoever computes a figure from a run hashes the
files first, at about 1.5 GB/s a core; ten million candidates are 0.2 GB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lever_data.errors import LeverError
from lever_data.store.files import sha256_file
from lever_data.store.manifest import Run


def damage(runs: Sequence[Run], tables: Collection[str] | None = None) -> Iterator[LeverError]:
    """What is wrong with the files of these runs, one error a file, in order.

    Args:
        tables: only the files of these tables; all where ``None``.
    """
    files = [
        (run, name)
        for run in runs
        for name in sorted(run.files)
        if tables is None or name.split("/", 1)[0] in tables
    ]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _fault(item[0].path / item[1], item[0].files[item[1]]), files)
        for (run, name), fault in zip(files, found, strict=True):
            if fault is not None:
                yield _error(run, name, fault)


def require_intact(runs: Sequence[Run], tables: Collection[str] | None = None) -> None:
    """Refuse runs whose files are not what was committed.

    Raises:
        LeverError: the first file that is missing, unreadable or altered.
    """
    for error in damage(runs, tables):
        raise error


def _fault(path: Path, digest: str) -> str | None:
    try:
        return None if sha256_file(path) == digest else "is not what was committed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _error(run: Run, name: str, fault: str) -> LeverError:
    return LeverError(
        f"a file of run {run.run} {fault}",
        where=str(run.path / name),
        hint=f"name other runs with --run to go on without it; `lever runs rm {run.run}` removes "
        "it, then make it again; or restore the file from a copy",
    )
