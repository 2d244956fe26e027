"""Optional TensorBoard events, written from the same log as ``metrics.parquet``.

In goes the log of a finished epoch; out come event files under ``<out>/tensorboard``. The package
is an extra: it is imported only when asked for.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path

from lever_data.errors import UsageError
from lever_train.learn.metrics import Log


def require_tensorboard() -> None:
    """Refuse before the training starts where the package is not there.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "TensorBoard is not installed",
            value="--tensorboard",
            hint="pip install 'lever[tensorboard]'; metrics.parquet and curves.html need nothing",
        )


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
