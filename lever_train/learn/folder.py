"""The folder a training writes: checkpoints, links, metrics, config, provenance.

In go the figures and the selector; out come files that are whole or not there, and a run of kind
``training`` in the store. A folder that holds another training is refused unless it is to be
resumed or overwritten. One training at a time writes it: the lock is the kernel's, which releases
it with the process, however that ends, so a killed training bars nobody, and the file it leaves
behind means nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError
from lever_data.store.files import discard, is_temporary, write_atomic
from lever_data.store.locks import Lock
from lever_data.store.store import RunSpec, Store
from lever_train.inputs.provenance import said
from lever_train.learn.curves import curves_page
from lever_train.learn.data import TrainingData
from lever_train.learn.log import Log, write_events
from lever_train.learn.state import STATE
from lever_train.options.resolve import resolve, to_toml
from lever_train.options.train import Source, TrainConfig
from lever_train.selector.checkpoint import Progress, save_v3
from lever_train.selector.model import Selector

METRICS, CONFIG = "metrics.parquet", "config.toml"
PROVENANCE, CURVES = "provenance.json", "curves.html"
EVENTS, LOCK = "tensorboard", ".training.lock"
_OURS = (STATE, METRICS, CURVES, PROVENANCE, CONFIG)


class TrainingFolder:
    """Writes into one folder, which its lock keeps for this training alone once it was checked."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._lock = Lock(out / LOCK)
        self._made = False

    def check(self, *, resume: bool, overwrite: bool, start: str | None = None) -> None:
        """Refuse a folder that holds another training; nothing is touched but the lock, which is
        taken where the folder is there.

        Args:
            resume: the training there is to be continued.
            overwrite: it is to be replaced.
            start: the checkpoint the new training starts from.

        Raises:
            UsageError: it holds a training and neither flag is given, or both are; or ``start``
                would be deleted.
            LeverError: it is not a folder, or a training writes it at this moment.
        """
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if self.out.exists() and not self.out.is_dir():
            raise LeverError("--out cannot be made (it is a file)", where=str(self.out))
        if self.out.exists():
            self._take()
        found = self._earlier()
        if not resume and not overwrite:
            self._require_empty()
        if overwrite and start is not None and Path(start).resolve() in map(Path.resolve, found):
            raise UsageError(
                "--overwrite would delete the checkpoint the training starts from",
                value=start,
                hint="name another --out",
            )

    def require_own(self) -> None:
        """Refuse a folder with checkpoints that the training described in it did not make.

        For callers that replace a training unasked: of these files nobody said they may go.

        Raises:
            LeverError: it names them.
        """
        if foreign := self._foreign():
            names = [path.name for path in foreign]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise LeverError(
                f"training would replace checkpoints it did not make: {', '.join(names[:5])}{more}",
                where=str(self.out),
                hint="move them away, or name another folder with [data] checkpoints in lever.toml",
            )

    def prepare(self) -> None:
        """Make the folder, without half-written files of a training that was killed.

        Raises:
            UsageError: it was not there when it was checked, and another training made it since.
            LeverError: it cannot be made, or that other training is not done.
        """
        try:
            self._made = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LeverError(
                f"--out cannot be made ({error.strerror})", where=str(self.out)
            ) from error
        if not self._lock.is_ours:
            self._take()
            self._require_empty()
        for path in self.out.glob(".*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let the next training begin; nothing where the lock is not held."""
        if self._lock.is_ours:
            discard(self.out / LOCK)  # while it is held: afterwards it may be another's
            self._lock.release()

    def clear(self) -> None:
        """Take back what a training wrote that failed before its first checkpoint.

        Its state could only be resumed into the same failure, and would bar the corrected command
        from the folder.
        """
        if not self._checkpoints():
            for name in _OURS:
                (self.out / name).unlink(missing_ok=True)
            self.release()
            if self._made and not any(self.out.iterdir()):
                self.out.rmdir()

    def _take(self) -> None:
        try:
            is_ours = self._lock.take(wait=False)
        except OSError as error:
            raise LeverError(
                f"--out cannot be locked ({error.strerror})", where=str(self.out / LOCK)
            ) from error
        if not is_ours:
            raise LeverError(
                "another training writes --out at this moment",
                where=str(self.out),
                hint="wait until it ends, or name another --out",
            )

    def earlier(self) -> list[str]:
        """Names of the files of a training in the folder."""
        return [path.name for path in self._earlier()]

    def delete(self, names: Sequence[str]) -> None:
        """Delete files of an earlier training, and its TensorBoard events.

        What the new training writes at its start, in place of the same of the earlier one, stays,
        and so does a file that is not of a training, whoever named it.
        """
        for path in reversed(self._earlier()):  # links before the checkpoints they point to
            if path.name in names and path.name not in (STATE, CONFIG, PROVENANCE):
                path.unlink()
        if names:
            shutil.rmtree(self.out / EVENTS, ignore_errors=True)

    def describe(self, config: TrainConfig, provenance: Mapping[str, object]) -> None:
        """Write the resolved config and where the data came from."""
        write_atomic(self.out / CONFIG, to_toml(config).encode())
        text = json.dumps(provenance, indent=2, ensure_ascii=False, default=str)
        write_atomic(self.out / PROVENANCE, f"{text}\n".encode())

    def checkpoint(self, selector: Selector, progress: Progress, is_best: bool) -> None:
        """Write ``<phase>_epoch<k>.pt`` and point ``last.pt``, and ``best.pt`` if it is, to it."""
        path = self.out / f"{progress.phase}_epoch{progress.epoch}.pt"
        save_v3(path, selector, progress)
        _link(self.out / "last.pt", path.name)
        if is_best:
            _link(self.out / "best.pt", path.name)

    def metrics(self, log: Log, *, tensorboard: bool = False) -> None:
        """Write ``metrics.parquet`` and ``curves.html``, and TensorBoard events where asked."""
        sink = pa.BufferOutputStream()
        pq.write_table(log.table(), sink, compression="zstd")
        write_atomic(self.out / METRICS, sink.getvalue().to_pybytes())
        page = curves_page(log, self.out.name, self._facts(), (self.out / CONFIG).read_text())
        write_atomic(self.out / CURVES, page.encode())
        if tensorboard:
            write_events(self.out / EVENTS, log)

    def commit(self, source: Source, config: TrainConfig, data: TrainingData, log: Log) -> str:
        """Commit the metrics to the store as a run of kind ``training``; returns what to say.

        The same training commits the same run, so doing it again changes nothing.
        """
        table = log.table()
        dataset, split = data.census.datasets[0]
        digest = hashlib.sha256()
        for column in table.columns:
            for buffer in column.combine_chunks().buffers():
                digest.update(buffer or b"")
        runs = data.provenance["runs"]
        spec = RunSpec(
            kind="training",
            dataset=dataset,
            split=split,
            source={"path": str(self.out)},
            source_sha256=digest.hexdigest(),
            parameters=config.model_dump(mode="json"),
            parents=tuple(map(str, runs)) if isinstance(runs, list) else (),
        )
        store = Store.open(source.store)
        if (found := store.find(spec)) is not None:
            return f"these metrics are in the store already: {found.run}"
        with store.begin(spec) as writer:
            writer.write("training_metrics", table)
            run = writer.commit({"provenance": data.provenance})
        return f"metrics committed as {run.run}: select … from training_metrics"

    def _facts(self) -> dict[str, str]:
        """What the figures are of, for the page of curves."""
        known = json.loads((self.out / PROVENANCE).read_bytes())
        return {
            "dataset/split": ", ".join(known["places"]),
            "runs read": ", ".join(f"`{run}`" for run in known["runs"]),
            "inputs": said(known["inputs"]),
            "reward": f"`{known['reward']}`",
            "checkpoints": f"`{self.out}`",
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        }

    def _require_empty(self) -> None:
        if self._earlier():
            raise UsageError(
                "--out holds another training",
                value=str(self.out),
                hint="continue it with --resume, replace it with --overwrite, or name another",
            )

    def _earlier(self) -> list[Path]:
        """Files of an earlier training in the folder."""
        own = [self.out / name for name in _OURS if (self.out / name).exists()]
        return self._checkpoints() + own

    def _foreign(self) -> list[Path]:
        """Checkpoints in the folder, links aside, that its config and provenance do not cover."""
        found = [path for path in self._checkpoints() if not path.is_symlink()]
        try:
            config = resolve(self.out / CONFIG, {})
        except UsageError:  # none, or not one of ours
            config = None
        if config is None or not (self.out / PROVENANCE).exists():
            return found + sorted(self.out.glob("*_epoch*_v2format.ckpt"))
        epochs = {"rce": config.rce.epochs, "grpo": config.grpo.epochs}
        if config.run.stage != "rl":
            epochs = {config.run.stage: getattr(config, config.run.stage).epochs}
        made = {f"{name}_epoch{k + 1}.pt" for name, count in epochs.items() for k in range(count)}
        return [path for path in found if path.name not in made]

    def _checkpoints(self) -> list[Path]:
        """Checkpoints of every phase, and the links ``last.pt`` and ``best.pt`` (or files)."""
        found = [
            path
            for phase in ("sft", "rce", "grpo", "dense")
            for path in sorted(self.out.glob(f"{phase}_epoch*.pt"))
        ]
        named = [self.out / name for name in ("last.pt", "best.pt")]
        return found + [path for path in named if path.is_symlink() or path.exists()]


def _link(link: Path, target: str) -> None:
    """Point a relative link to ``target``, replacing the old one at once."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    temporary.symlink_to(target)
    temporary.replace(link)
