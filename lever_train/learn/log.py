"""What was measured: one row per step and one per epoch, kept exactly, written as one table.

In go named figures; out comes the long table ``metrics.parquet``: phase, epoch, step (null for
figures of a whole epoch), metric, value. The log is part of the saved state, so a resumed training
ends with the same table, bit for bit; nothing in it depends on the clock. TensorBoard
events and trackio's runs are written from the same log; both packages are extras, imported only
when asked for.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lever_data.errors import UsageError
from lever_train.options.train import RunConfig

SCHEMA = pa.schema(
    [
        pa.field("phase", pa.string(), nullable=False),  # sft | rce | grpo | dense
        pa.field("epoch", pa.int32(), nullable=False),  # from 1 within the phase
        pa.field("step", pa.int64()),  # batch number in the phase, from 0; null: whole epoch
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: the batch made no step
    ]
)


@dataclass
class Frame:
    """Rows of equal columns; the first two are epoch and step (-1: whole epoch)."""

    names: tuple[str, ...]
    rows: list[list[float]] = field(default_factory=list)


class Log:
    """Figures by phase, of steps and of epochs apart."""

    def __init__(self) -> None:
        self.frames: dict[str, Frame] = {}

    def step(self, phase: str, epoch: int, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of one batch."""
        self._add(f"{phase}/step", epoch, step, figures)

    def epoch(self, phase: str, epoch: int, figures: Mapping[str, float]) -> None:
        """Add the figures of one epoch."""
        self._add(f"{phase}/epoch", epoch, -1, figures)

    def epoch_figures(self, phase: str, epoch: int) -> dict[str, float]:
        """An epoch's step figures: ``train_<name>``, means weighted by the step's ``weight``, and
        the sums ``groups`` and ``tied``. A mean is left out where no step was made."""
        frame = self.frames[f"{phase}/step"]
        table = torch.tensor([r for r in frame.rows if r[0] == epoch], dtype=torch.float64)
        by_name = dict(zip(frame.names, table[:, 2:].T, strict=True))
        share = by_name.pop("weight")
        sums = {name: float(by_name.pop(name).sum()) for name in ("groups", "tied")}
        made = share > 0
        if not made.any():
            return sums
        share = share[made] / share[made].sum()
        return {f"train_{n}": float((v[made] * share).sum()) for n, v in by_name.items()} | sums

    def epochs(self) -> list[dict[str, Any]]:
        """The figures of every epoch, in order, with their phase and epoch."""
        found: list[dict[str, Any]] = []
        for key, frame in self.frames.items():
            phase, kind = key.split("/")
            if kind == "epoch":
                found += [
                    {"phase": phase, "epoch": int(r[0])}
                    | dict(zip(frame.names, r[2:], strict=True))
                    for r in frame.rows
                ]
        return found

    def table(self) -> pa.Table:
        """The long table."""
        parts = [_long(key.split("/")[0], frame) for key, frame in self.frames.items()]
        return pa.concat_tables([SCHEMA.empty_table(), *parts]).combine_chunks()

    def state(self) -> dict[str, object]:
        """For ``torch.save``: names and one float64 tensor per frame."""
        return {
            key: {"names": list(f.names), "rows": torch.tensor(f.rows, dtype=torch.float64)}
            for key, f in self.frames.items()
        }

    @classmethod
    def of(cls, state: Mapping[str, Mapping[str, object]]) -> Log:
        """The log whose :meth:`state` this is."""
        log = cls()
        for key, part in state.items():
            names, rows = part["names"], part["rows"]
            assert isinstance(names, list) and isinstance(rows, torch.Tensor)
            log.frames[key] = Frame(tuple(names), rows.tolist())
        return log

    def _add(self, key: str, epoch: int, step: int, figures: Mapping[str, float]) -> None:
        frame = self.frames.setdefault(key, Frame(tuple(figures)))
        if tuple(figures) != frame.names:
            raise AssertionError(f"{key}: {tuple(figures)} are not {frame.names}")
        frame.rows.append([float(epoch), float(step), *figures.values()])


def _long(phase: str, frame: Frame) -> pa.Table:
    """One row per row and name, in that order."""
    rows = torch.tensor(frame.rows, dtype=torch.float64).numpy()
    width = len(frame.names)
    step = rows[:, 1].astype("int64").repeat(width)
    values = rows[:, 2:].ravel()
    columns = [
        pa.array([phase] * len(values), pa.string()),
        pa.array(rows[:, 0].astype("int32").repeat(width)),
        pa.array(step, mask=step < 0),
        pa.array(list(frame.names) * len(rows), pa.string()),
        pa.array(values, mask=values != values),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def require_extras(run: RunConfig) -> None:
    """Refuse before the training starts where a package that is asked for is not there.

    Raises:
        UsageError: it is not installed.
    """
    for name, asked in (("tensorboard", run.tensorboard), ("trackio", run.trackio)):
        if asked and importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{name} is not installed",
                value=f"--{name}",
                hint=f"pip install 'lever[{name}]'; metrics.parquet and curves.html need nothing",
            )


class Track:
    """A run of trackio, on this machine: the figures of every epoch when it ends, once.

    A resumed training goes on with the newest run of its name. What trackio prints goes to stderr:
    stdout is the command's result.
    """

    def __init__(self, name: str, config: Mapping[str, Any], *, resume: bool) -> None:
        import trackio

        resumed = "allow" if resume else "never"
        with redirect_stdout(sys.stderr):
            trackio.init(
                project="lever", name=name, config=dict(config), resume=resumed, embed=False
            )
        self._trackio = trackio

    def epoch(self, log: Log, phase: str, epoch: int) -> None:
        """Log the figures of the epoch that just ended; steps count over all phases."""
        done = sum(len(f.rows) for key, f in log.frames.items() if key.endswith("/step"))
        for kind in ("step", "epoch"):
            frame = log.frames[f"{phase}/{kind}"]
            rows = [row[2:] for row in frame.rows if row[0] == epoch]
            for number, row in enumerate(rows, done - len(rows)):  # an epoch at its last step
                figures = zip(frame.names, row, strict=True)
                known = {f"{phase}/{kind}/{n}": v for n, v in figures if math.isfinite(v)}
                self._trackio.log(known, step=number)

    def end(self) -> None:
        """Write what is left and end the run."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


def write_events(folder: Path, log: Log) -> None:
    """Write every figure known so far anew: a resumed training leaves no doubled points."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for row in log.table().to_pylist():
            if row["value"] is None or not math.isfinite(row["value"]):
                continue
            kind, at = ("epoch", row["epoch"]) if row["step"] is None else ("step", row["step"])
            name = f"{row['phase']}/{kind}/{row['metric']}"
            writer.add_scalar(name, row["value"], at)
