"""Entry point of the console script ``lever`` and of ``python -m lever_cli``.

What another process can start with begins here; the command line is imported meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Run the command line: exit 0 done, 1 the user's data, 2 usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    named = next((w for w in words if not w.startswith("-")), None)
    if named == "ingest":
        _start_helper(words)
    from .app import run

    run(words, named)


def _start_helper(words: Iterable[str]) -> None:
    """Start the second process of an ingest, where a word names a file that wants one.

    It imports what it needs while this process does the same, typer among it: 0.2 s of 2.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would spin, for nothing

    from lever_data.sources.process import start_early

    start_early(map(Path, words))


if __name__ == "__main__":
    main()
