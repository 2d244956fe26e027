"""The folder a training writes: checkpoints, links, metrics, config, provenance.

In go the figures and the selector; out come files that are whole or not there. A folder that holds
another training is refused unless it is to be resumed or overwritten.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError
from lever_data.store import write_atomic
from lever_train.checkpoint import Progress, save_v3
from lever_train.config import TrainConfig
from lever_train.options import to_toml
from lever_train.selector import Selector
from lever_train.state import STATE

METRICS, CONFIG, PROVENANCE, CURVES = (
    "metrics.parquet",
    "config.toml",
    "provenance.json",
    "curves.html",
)
_OURS = (STATE, METRICS, CONFIG, PROVENANCE, CURVES)


def prepare(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, or refuse one that holds another training.

    Raises:
        UsageError: it holds a training and neither ``resume`` nor ``overwrite`` is given, or both.
        LeverError: it cannot be made.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeverError(f"--out cannot be made ({error.strerror})", where=str(out)) from error
    found = _earlier(out)
    if found and not resume and not overwrite:
        raise UsageError(
            "--out holds another training",
            value=str(out),
            hint="continue it with --resume, replace it with --overwrite, or name another folder",
        )
    if overwrite:
        for path in found:
            path.unlink(missing_ok=True)
        shutil.rmtree(out / "tensorboard", ignore_errors=True)


def write_description(out: Path, config: TrainConfig, provenance: Mapping[str, object]) -> None:
    """Write the resolved config and where the data came from."""
    write_atomic(out / CONFIG, to_toml(config).encode())
    text = json.dumps(provenance, indent=2, ensure_ascii=False, default=str)
    write_atomic(out / PROVENANCE, f"{text}\n".encode())


def write_checkpoint(out: Path, selector: Selector, progress: Progress, is_best: bool) -> Path:
    """Write ``<phase>_epoch<k>.pt`` and point ``last.pt``, and ``best.pt`` if it is, to it."""
    path = out / f"{progress.phase}_epoch{progress.epoch}.pt"
    save_v3(path, selector, progress)
    _link(out / "last.pt", path.name)
    if is_best:
        _link(out / "best.pt", path.name)
    return path


def write_metrics(out: Path, table: pa.Table) -> None:
    """Write ``metrics.parquet``."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(out / METRICS, sink.getvalue().to_pybytes())


def _earlier(out: Path) -> list[Path]:
    """Files of an earlier training in the folder."""
    own = [out / name for name in _OURS if (out / name).exists()]
    checkpoints = [p for phase in ("sft", "rce", "grpo") for p in out.glob(f"{phase}_epoch*.pt")]
    links = [out / name for name in ("last.pt", "best.pt") if (out / name).is_symlink()]
    return own + checkpoints + links


def _link(link: Path, target: str) -> None:
    """Point a relative link to ``target``, replacing the old one at once."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    temporary.symlink_to(target)
    temporary.replace(link)
