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
from enum import StrEnum
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from .help import Group, Help
from .interrupts import interrupts

# Newer versions of typer carry a click of their own, so its base error is found through typer.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_INTERRUPTED = 130
COMMANDS = (
    *("audit", "beam", "board", "check", "compact", "convert", "copy", "demo", "diff", "embed"),
    *("eval", "export", "generate", "ingest", "pack", "plan", "predict", "query", "rescore", "run"),
    *("runs", "serve", "sweep", "train", "value", "views"),
)
READING = (  # commands that leave the store as it is
    *("audit", "board", "check", "diff", "export", "plan", "query", "runs", "value", "views"),
)
_HELP = """Offline reinforcement learning of an in-context-demonstration selector: legacy JSON to
Parquet, SQL views, one trainer.

Results go to stdout, notices and progress to stderr.

\b
Exit codes: 0    done
            1    a problem with the data, or a gate that failed
            2    a malformed request: a wrong option, an unknown name
            130  interrupted; what was finished is kept
"""


class Verify(StrEnum):
    """When the bytes of the files that a command reads are compared with the manifest."""

    once = "once"
    full = "full"


def command_line(names: Sequence[str] = COMMANDS, *, with_completion: bool = False) -> typer.Typer:
    """The command line with these commands, and the options that set up the shell's completion."""
    app = typer.Typer(
        name="lever",
        no_args_is_help=True,
        add_completion=with_completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        cls=Group,
        help=_HELP,
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
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    verify: Annotated[
        Verify | None,
        typer.Option(
            "--verify",
            help="once (default): a stored file is hashed when it is new here or was touched; "
            "full: always, as with LEVER_VERIFY=full.",
        ),
    ] = None,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of",
            metavar="RUN|TIME",
            help="Read the store as it was when RUN was committed, or at TIME (ISO 8601, UTC): "
            "later runs are left out. For commands that only read.",
        ),
    ] = None,
) -> None:
    _display.tracebacks = debug
    if as_of is not None:
        _require_reading(context.invoked_subcommand)
        os.environ["LEVER_AS_OF"] = as_of  # for the processes of this command too
    if verify is not None:
        os.environ["LEVER_VERIFY"] = verify.value  # for the processes of this command too


def _require_reading(command: str | None) -> None:
    if command not in READING:
        from lever_data.errors import UsageError

        raise UsageError(
            f"lever {command} writes to the store, and --as-of is for commands that only read",
            value=", ".join(READING),
            hint="--run names the runs to read",
        )


class _Display:
    """What this run shows beside its messages."""

    tracebacks = False


_display = _Display()


def run(words: list[str]) -> NoReturn:
    """Run the command that ``words`` begin with, and exit (codes: see ``_HELP``)."""
    _display.tracebacks = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console may know neither τ nor 数
            stream.reconfigure(errors="backslashreplace")
    completed = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()
    named = next((w for w in words or completed[1:] if not w.startswith("-")), None)
    names = [named] if named in COMMANDS else COMMANDS
    try:
        app = command_line(names, with_completion=named not in words)
        code = app(args=words, prog_name="lever", standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns the signal into a bare exit code
            raise KeyboardInterrupt
    except SystemExit as left:  # typer's answer to a closed pipe is 1
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        code = _reader_left()
    except BrokenPipeError:
        code = _reader_left()
    except _CLICK_ERROR as error:
        error.show()
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - what has no sentence is raised again
        code = _code_of(error, named)
    if "duckdb" not in sys.modules:  # whose binding takes what is frozen for a leak, and says so
        gc.freeze()  # or the interpreter looks for cycles in all that was imported: 0.1 s
    sys.exit(code if isinstance(code, int) else 0)


def _code_of(error: BaseException, named: str | None) -> int:
    """Say in a sentence what went wrong; returns the exit code.

    Raises:
        BaseException: the error itself, where it is a bug of ours.
    """
    from lever_data.errors import LeverError

    if interrupts.seen or isinstance(error, typer.Abort | KeyboardInterrupt):
        # every library says in its own way that it was interrupted
        again = "with --resume the command" if named == "train" else "the same command"
        hint = f"what was finished is kept; {again} goes on where it can"
        return _report("interrupted", hint, _INTERRUPTED)
    if isinstance(error, LeverError):
        return _report(error.message(), error.hint, error.exit_code)
    if isinstance(error, OSError):
        where = f"; at {error.filename}" if error.filename else ""
        return _report(f"{error.strerror or error}{where}", "--debug shows more", 1)
    if isinstance(error, _duckdb_failures()):
        return _report(str(error), _remedy(error), 1)
    if isinstance(error, MemoryError):
        return _report("out of memory", "lower --batch-size or the memory limit", 1)
    raise error


def _reader_left() -> int:
    """Nobody reads our output any more (``| head``): that is not an error of ours."""
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
    if _display.tracebacks:
        traceback.print_exc()
    return code
