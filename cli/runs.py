"""``lever runs``: list, show and remove the runs of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags
from .help import Group, Help

OneRun = Annotated[str, words("The run, or a prefix that only it has.", argument=True)]
app = typer.Typer(help="List, show and remove runs.", invoke_without_command=True, cls=Group)


@app.callback()
@with_flags
def list_runs(
    context: typer.Context, store: StorePath = DEFAULT_STORE, json: JsonFile = None
) -> None:
    """List the runs of a store, oldest first."""
    if context.invoked_subcommand is not None:
        context.obj = store
        return
    from lever_data.store.store import Store

    found = Store.open(store).inventory()
    runs = [
        {
            "run": r.run,
            "rows": r.num_rows,
            "kind": r.kind,
            "dataset": r.dataset,
            "split": r.split,
            "order": r.parameters.get("order", "file") if r.kind == "examples" else None,
            "committed_at": r.committed_at,
        }
        for r in found.runs
    ]
    if emit(runs, json):
        pass
    elif not runs and not found.damaged:
        notice("The store has no runs yet; `lever ingest FILE` makes one.")
    elif runs:
        # what the id of a run says too stands in the middle, which a narrow terminal leaves out
        rows = [[*row.values()] for row in runs]
        for row, run in zip(rows, found.runs, strict=True):
            row[-1] = f"{run.committed_at[:16]}Z"  # UTC, to the minute
        emit_table(list(runs[0]), rows)
    for error in found.damaged.values():
        notice(f"Error: {error.message()}\nHint: {error.hint}")
    if found.damaged:
        raise typer.Exit(1)


@app.command(cls=Help)
@with_flags
def show(
    context: typer.Context,
    run: OneRun,
    store: StorePath = DEFAULT_STORE,
    json: JsonFile = None,
) -> None:
    """Show one run's manifest: source, parameters, rows, files."""
    from lever_data.store.store import Store

    found = asdict(Store.open(_store(context, store)).run(run))
    found["path"] = str(found["path"])
    if emit(found, json):
        return
    inputs = [*found["details"].pop("inputs", ()), *_provenance(found).pop("inputs", ())]
    rows = [(f"input: {i['role']}", f"{i['path']}  sha256 {i['sha256']}") for i in inputs]
    emit_table(["field", "value"], [*rows, *_fields(found)])


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    """Values by dotted name, each a line; what has none says where it is."""
    items = value if isinstance(value, list | tuple) else ()
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    elif any(isinstance(item, dict | list | tuple) for item in items):
        yield name, f"{len(items):,} entries, shown by --json"
    elif isinstance(value, str) and "\n" in value.strip():
        yield name, f"{len(value.splitlines()):,} lines, shown by --json"
    elif isinstance(value, dict | list | tuple):
        yield name, ", ".join(map(str, items)) or None
    else:
        yield name, value


def _provenance(found: dict[str, Any]) -> dict[str, Any]:
    """Of a training: what it was made from."""
    provenance: dict[str, Any] = found["details"].get("provenance", {})
    return provenance


@app.command(cls=Help)
@with_flags
def rm(
    context: typer.Context,
    run: OneRun,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Remove a run from the store, whole."""
    from lever_data.store.store import Store

    removed = Store.open(_store(context, store)).remove(run)
    notice(f"removed {removed}")


def _store(context: typer.Context, given: Path) -> Path:
    """The store named after the subcommand, else the one named before it."""
    before: Path | None = context.obj
    return given if given != DEFAULT_STORE or before is None else before
