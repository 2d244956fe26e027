"""``lever train``: train a selector on the views of a store.

The options are those of ``lever_train.options.train``: each field there is a flag here, so that an
option has one definition. A TOML file gives the same by section and name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lever_data.options import Tables, TablesOf, words
from lever_train.options.resolve import resolve
from lever_train.options.train import Source, TrainConfig

from .common import emit_table, notice, progress_bar
from .flags import with_flags

if TYPE_CHECKING:
    from lever_train.learn.train import TrainResult


@with_flags
def train(
    given: Annotated[Tables, TablesOf(TrainConfig)],
    source: Source,
    out: Annotated[Path, words("Folder for checkpoints and metrics.", metavar="DIR")],
    config: Annotated[
        Path | None,
        words("TOML or YAML file of options; flags beat it.", metavar="FILE", everyday=True),
    ] = None,
    resume: Annotated[bool, words("Continue the training in --out.", everyday=True)] = False,
    overwrite: Annotated[bool, words("Replace the training in --out.", everyday=True)] = False,
) -> None:
    """Train a selector: RCE, then GRPO if asked; or SFT on InfoScore beams."""
    from lever_train.learn import train as trainer

    with progress_bar("train", "queries") as advance:
        result = trainer.train(
            source,
            out,
            resolve(config, given),
            resume=resume,
            overwrite=overwrite,
            notify=notice,
            advance=advance,
        )
    if result.is_main:
        _show(result)


def _show(result: TrainResult) -> None:
    """A table per phase on stdout, a row per epoch; the speed and the files on stderr."""
    for phase in dict.fromkeys(row["phase"] for row in result.epochs):
        epochs = [row for row in result.epochs if row["phase"] == phase]
        names = [name for name in epochs[0] if name not in ("phase", "epoch")]
        # where it is too wide it loses columns of its middle: what people watch comes first
        names.sort(key=lambda name: (name != "train_loss", not name.startswith("val_")))
        emit_table(
            [f"{phase} epoch", *(name.replace("_", " ") for name in names)],
            [[str(row["epoch"]), *(row[name] for name in names)] for row in epochs],
        )
    if result.groups:
        rate = result.groups / result.seconds
        notice(f"{result.groups:,} groups in {result.seconds:.1f} s: {rate:,.0f} queries/s")
    notice(f"last checkpoint {result.last.resolve().name}, best {result.best.name} in {result.out}")
