"""Run commands as a shell would, but inside this process: importing torch costs seconds."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass

from lever_cli.__main__ import main


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def lever(*argv: object, check: bool = True) -> Done:
    """Run ``lever`` with these arguments; with ``check`` a failure is an AssertionError."""
    # with a buffer of bytes below, as the process's own have
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code, environment = 0, dict(os.environ)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:  # `--verify` and `--as-of` are for the command's own processes
            if environment != dict(os.environ):
                os.environ.clear()
                os.environ.update(environment)
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    done = Done(code, *said)
    assert not check or code == 0, f"lever {' '.join(map(str, argv))}: {code}\n{done.stderr}"
    return done
