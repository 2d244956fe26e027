"""``lever train``: train a selector on the views of a store.

The options are those of ``lever_train.options.train``: each field there is a flag here, so that an
option has one definition. A TOML file gives the same by section and name.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lever_train.options.resolve import Option, options, resolve

from .common import (
    DEFAULT_STORE,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_table,
    notice,
    progress_bar,
)

if TYPE_CHECKING:
    from lever_train.learn.train import TrainResult


def train(
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and metrics.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of options; flags beat it.", metavar="FILE")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the training in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the training in --out.")
    ] = False,
    **flags: Any,
) -> None:
    """Train a selector: RCE, then GRPO if asked; or SFT on InfoScore beams."""
    from lever_data.errors import UsageError
    from lever_train.learn import train as trainer
    from lever_train.learn.data import Source

    if out is None:
        raise UsageError("no output folder is named", hint="--out DIR")
    with progress_bar("train", "queries") as advance:
        result = trainer.train(
            trainer.TrainRequest(
                source=Source(store, tuple(run), sql_dir),
                out=out,
                config=resolve(config, flags),
                resume=resume,
                overwrite=overwrite,
                notify=notice,
                advance=advance,
            )
        )
    if result.is_main:
        _show(result)


def _show(result: TrainResult) -> None:
    """One table a phase on stdout, a column per epoch; the speed and the files on stderr."""
    for phase in dict.fromkeys(row["phase"] for row in result.epochs):
        epochs = [row for row in result.epochs if row["phase"] == phase]
        metrics = [name for name in epochs[0] if name not in ("phase", "epoch")]
        emit_table(
            [f"{phase} epoch", *(str(row["epoch"]) for row in epochs)],
            [[name, *(row[name] for row in epochs)] for name in metrics],
        )
    if result.groups:
        rate = result.groups / result.seconds
        notice(f"{result.groups:,} groups in {result.seconds:.1f} s: {rate:,.0f} queries/s")
    notice(f"last checkpoint {result.last.resolve().name}, best {result.best.name} in {result.out}")


def _parameter(item: Option) -> inspect.Parameter:
    """A field of the config as a parameter of the command; ``None`` means not given."""
    kind, repeatable = item.base
    annotation: Any = Literal[item.choices] if item.choices else kind
    option = typer.Option(
        *item.declarations,
        help=item.help.replace("[", "\\["),
        rich_help_panel=item.panel.replace("[", "\\["),
        show_default=False,
    )
    annotation = list[annotation] if repeatable else annotation | None
    return inspect.Parameter(
        item.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=[] if repeatable else None,
        annotation=Annotated[annotation, option],
    )


def _with_options(command: Any) -> Any:
    """The command with one parameter for every option of the config."""
    own = inspect.signature(command, eval_str=True)
    fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [_parameter(item) for item in options()]
    command.__signature__ = own.replace(parameters=[*fixed, *added])
    command.__annotations__ = {p.name: p.annotation for p in (*fixed, *added)}
    return command


train = _with_options(train)
