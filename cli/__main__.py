"""Entry point of the console script ``lever`` and of ``python -m lever_cli``."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> None:
    """Run the command line: exit 0 done, 1 the user's data, 2 usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    named = next((w for w in words if not w.startswith("-")), None)
    from .app import run

    run(words, named)


if __name__ == "__main__":
    main()
