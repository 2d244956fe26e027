"""Entry point of the console script ``lever`` and of ``python -m lever_cli``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from .interrupts import interrupts


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line: exit 0 done, 1 the user's data, 2 usage, 130 interrupted."""
    interrupts.watch()
    # pydantic looks through all installed packages for plugins: 10 ms of every command
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    words = sys.argv[1:] if argv is None else argv
    # the other process of a query imports as long as this one does, so it starts first; what
    # stands before the command changes the environment that it takes over
    is_query = words[:1] == ["query"] and not {"-h", "--help"} & set(words)
    try:
        try:
            if is_query:
                from lever_data.relations.child import start_ahead

                start_ahead()
            from .app import run
        except BaseException:  # an import that is cut off raises what it likes
            if not interrupts.seen:
                raise
            print("Error: interrupted", file=sys.stderr)  # before anything began
            sys.exit(130)
        run(words)
    finally:
        if is_query:
            from lever_data.relations.child import end_ahead

            end_ahead()


def process() -> NoReturn:
    """:func:`main` as a process of its own.

    After an interrupt it ends at once: Python would wait for threads that nobody stops any more,
    and end by the signal where C code had met it.
    """
    interrupts.is_process = True
    try:
        main()
    except SystemExit as left:
        if left.code == 130:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(130)
        raise


if __name__ == "__main__":
    process()
