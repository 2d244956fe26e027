"""A sweep file: a base pipeline, and which training options its cells differ in.

In goes a TOML file; out comes a :class:`SweepConfig` and its cells in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from lever_data.options import Section, Tables, option, options
from lever_data.toml import inside, read_toml, require_fields, require_known, validated
from lever_train.options.pipeline import EvalTable, PipelineConfig, load_pipeline
from lever_train.options.resolve import by_section, lay_over
from lever_train.options.train import TrainConfig

DEMO = "demo"
Settings = dict[str, Any]


class SweepConfig(Section):
    """What a sweep starts from, and what its cells change."""

    name: str = Field(
        description="Name of the sweep; its folder in `out`.",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
    )
    base: str = option(
        DEMO, "A `lever.toml`, seen from this file; `demo`: the world of `lever demo`."
    )
    out: Path = option(Path("sweeps"), "Folder of all sweeps, seen from where the command runs.")
    judged_on: tuple[str, ...] = option(
        (),
        "Views of training questions, such as held_out_fold: every cell trains once for each, "
        "without its questions, and is judged on them; the evaluation split is not read.",
    )
    eval: dict[str, Any] = option(
        {}, "How all cells are judged, over the base: `[eval]` as in a `lever.toml`."
    )
    train: dict[str, dict[str, Any]] = option(
        {}, "Options all cells share, over those of the base: `[train.…]` as in a `lever.toml`."
    )
    grid: dict[str, tuple[Any, ...]] = option(
        {}, "Option → the values it takes; every combination is a cell."
    )
    cells: tuple[dict[str, Any], ...] = option(
        (), "Single cells, each a table of options; each is combined with the whole grid."
    )

    def settings(self) -> list[Settings]:
        """What each cell sets, in order; no two are the same."""
        combined = [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]
        listed = self.cells or ({},)
        return [{**cell, **chosen} for cell in listed for chosen in combined]


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file; ``base`` is relative to it, ``out`` to where the command runs.

    Raises:
        UsageError: the file cannot be read, a key is unknown, or a cell's options are not allowed.
    """
    tables = read_toml(path, "the sweep")
    require_fields(SweepConfig, tables, "the sweep", str(path))
    sweep = validated(SweepConfig, tables, "the sweep", inside(str(path)))
    require_fields(EvalTable, sweep.eval, "the sweep", f"{path}: [eval]")
    _require_options(sweep, str(path))
    changes: dict[str, Any] = {"out": sweep.out.absolute()}
    if sweep.base != DEMO:
        changes["base"] = str(path.absolute().parent / sweep.base)
    sweep = sweep.model_copy(update=changes)
    base = TrainConfig() if sweep.base == DEMO else load_pipeline(Path(changes["base"])).train
    for settings in sweep.settings():
        cell_config(base, sweep, settings, str(path))
    return sweep


def cell_config(
    base: TrainConfig, sweep: SweepConfig, settings: Mapping[str, Any], where: str
) -> TrainConfig:
    """The training config of a cell.

    Raises:
        UsageError: a value that is not allowed.
    """
    tables: Tables = base.model_dump(mode="json", exclude_unset=True)
    lay_over(tables, sweep.train)
    lay_over(tables, by_section(settings))
    return validated(TrainConfig, tables, "an option of the sweep", inside(where))


def judged_base(base: PipelineConfig, sweep: SweepConfig, where: str) -> PipelineConfig:
    """The base, its cells judged as the sweep says.

    Raises:
        UsageError: a value that is not allowed.
    """
    tables = base.eval.model_dump(mode="json", exclude_unset=True) | sweep.eval
    judging = validated(EvalTable, tables, "[eval] of the sweep", inside(where))
    return base.model_copy(update={"eval": judging})


def _require_options(sweep: SweepConfig, where: str) -> None:
    """Refuse what is set and is not an option of a training."""
    require_fields(TrainConfig, sweep.train, "the sweep", f"{where}: [train]")
    known = [item.dotted for item in options(TrainConfig)]
    require_known(sweep.grid, known, "the sweep", f"{where}: [grid]")
    for cell in sweep.cells:
        require_known(cell, known, "the sweep", f"{where}: [[cells]]")
