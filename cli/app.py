"""The command line as a whole: which commands there are, and what becomes of their errors.

Every command is a function in the module of its name, or a group there; only the module of the
command that is called is imported, and heavy imports (duckdb, pyarrow, torch) stand inside the
functions, so that every command starts at once.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from .help import Group, Help

# Newer versions of typer carry a click of their own, so its base error is found through typer.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_INTERRUPTED = 130
COMMANDS = (
    *("audit", "beam", "check", "convert", "demo", "diff", "embed", "eval", "export", "generate"),
    *("ingest", "predict", "query", "rescore", "run", "runs", "sweep", "train", "views"),
)


def command_line(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands."""
    app = typer.Typer(
        name="lever",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        cls=Group,
        help="Offline reinforcement learning of an in-context-demonstration selector: "
        "legacy JSON → Parquet → SQL views → one trainer.",
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=_root,
    )
    for name in names:
        module = import_module(f".{name}", __package__)
        if group := getattr(module, "app", None):
            app.add_typer(group, name=name)
        else:
            app.command(name, cls=Help)(getattr(module, name))
    return app


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"lever {version('lever')}")
        raise typer.Exit


def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    _shown.tracebacks = debug


class _Shown:
    """What this run shows beside its messages."""

    tracebacks = False


_shown = _Shown()


def run(words: list[str], named: str | None) -> NoReturn:
    """Run the command ``named`` among ``words``, if any, and exit (codes: see ``__main__``)."""
    from lever_data.errors import LeverError

    _shown.tracebacks = False
    app = command_line([named] if named in COMMANDS else COMMANDS)
    try:
        code = app(args=words, standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns the signal into a bare exit code
            raise KeyboardInterrupt
    except LeverError as error:
        code = _report(error.message(), error.hint, error.exit_code)
    except _CLICK_ERROR as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        again = "with --resume the command" if named == "train" else "the same command"
        hint = f"what was finished is kept; {again} goes on where it can"
        code = _report("interrupted", hint, _INTERRUPTED)
    except BrokenPipeError:
        code = _reader_left()
    except SystemExit as left:  # typer's answer to a closed pipe is 1
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        code = _reader_left()
    except OSError as error:
        where = f"; at {error.filename}" if error.filename else ""
        code = _report(f"{error.strerror or error}{where}", "--debug shows more", 1)
    except _duckdb_failures() as error:
        code = _report(str(error), _remedy(error), 1)
    except MemoryError:
        code = _report("out of memory", "lower --batch-size or the memory limit", 1)
    if "duckdb" not in sys.modules:  # whose binding takes what is frozen for a leak, and says so
        gc.freeze()  # or the interpreter looks for cycles in all that was imported: 0.1 s
    sys.exit(code if isinstance(code, int) else 0)


def _reader_left() -> int:
    """Nobody reads our output any more (``| head``): that is no error of ours."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _duckdb_failures() -> tuple[type[Exception], ...]:
    """DuckDB's errors that come from the machine: a file that went, no disk or memory to spill to.

    Its other errors would be bugs of ours. It is not imported for this: a command that does not
    use it starts faster.
    """
    duckdb = sys.modules.get("duckdb")
    return () if duckdb is None else (duckdb.IOException, duckdb.OutOfMemoryException)


def _remedy(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryException":
        return "give DuckDB more memory (lever train: --memory-limit), or room on disk to spill to"
    return "is the disk full, or was a run removed meanwhile?"


def _report(message: str, hint: str | None, code: int) -> int:
    print(f"Error: {message}", file=sys.stderr)
    if hint:
        print(f"Hint: {hint}", file=sys.stderr)
    if _shown.tracebacks:
        traceback.print_exc()
    return code
