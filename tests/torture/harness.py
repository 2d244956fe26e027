"""Run commands that are killed, then prove what is left: the tools of every torture room.

In goes a command line and when to kill it; out come the outcome and, from the store, the digest
of every committed run. The checks read the store's files themselves, with hashlib, json and
pyarrow, so that they do not trust the code they test.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pyarrow.parquet as pq
import pytest

Snapshot = dict[str, dict[str, str]]  # run → file → sha256, the manifest without its time


@dataclass(frozen=True)
class Outcome:
    """How a command ended: killed, or with an exit code; ``changes`` it made where it ended."""

    killed: bool
    code: int | None
    seconds: float
    stdout: str
    stderr: str
    changes: int | None


class Nursery:
    """A warm process whose forked children run ``lever`` (see ``nursery.py``)."""

    def __init__(self, folder: Path, *modules: str, mount: str = "") -> None:
        """``mount`` is a shell command that changes what is mounted, for this nursery alone."""
        self._folder = folder
        # a temporary folder of its own: what others left in the common one is swept at a start, and
        # would count among the changes of the file system
        temporary = folder / "temporary"
        temporary.mkdir()
        words = [sys.executable, "-m", "tests.torture.nursery", *modules]
        if mount:
            script = f'{mount} && exec "$@"'
            words = ["unshare", "--mount", "sh", "-c", script, "sh", *words]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TMPDIR": str(temporary)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._pipe(self._process.stdin), self._pipe(self._process.stdout)):
            pipe.close()
        self._process.wait(60)

    def sees(self, path: Path) -> Path:
        """A path as this nursery sees it, whatever is mounted there for it."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def run(
        self,
        *argv: str | Path,
        kill_after: float | None = None,
        kill_before: int | None = None,
        file_limit: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Outcome:
        """Run one command.

        Args:
            kill_after: seconds after which it is killed.
            kill_before: number, from 1, of the change of the file system it does not live to make.
            file_limit: bytes beyond which no file of it may grow (RLIMIT_FSIZE).
        """
        out, err = self._folder / "stdout", self._folder / "stderr"
        counted = Path(f"{out}.changes")
        counted.unlink(missing_ok=True)
        request = {
            "argv": [str(word) for word in argv],
            "stdout": str(out),
            "stderr": str(err),
            "kill_after": kill_after,
            "kill_before": kill_before,
            "file_limit": file_limit,
            "env": dict(env or {}),
            "cwd": str(cwd or Path.cwd()),
            "timeout": 240.0,
        }
        stdin, stdout = self._pipe(self._process.stdin), self._pipe(self._process.stdout)
        print(json.dumps(request), file=stdin, flush=True)
        reply = json.loads(stdout.readline())
        texts = [path.read_text("utf-8", "replace") if path.exists() else "" for path in (out, err)]
        count = counted.read_text("ascii") if counted.exists() else ""
        changes = int(count) if count else None  # it may be killed while it writes this
        return Outcome(**reply, stdout=texts[0], stderr=texts[1], changes=changes)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def needs_mounts() -> None:
    """Skip where this process may not mount anything, even for itself alone."""
    try:
        done = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("this system has no unshare command")
    if done.returncode:
        pytest.skip(f"mounting needs privileges: {done.stderr.decode().strip()}")


def lever(*argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command to its end in a fresh process."""
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=240, **options)


def command(*argv: str | Path) -> list[str]:
    """The words that run ``lever`` in a fresh process."""
    return [sys.executable, "-m", "lever_cli", *map(str, argv)]


def verify(store: Path) -> Snapshot:
    """Check every committed run against its manifest; returns what is committed.

    A run's folder holds its manifest and the files it names, nothing else; every sha256 and every
    row count is as it says.
    """
    found: Snapshot = {}
    for folder in sorted((store / "runs").iterdir()):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert folder.name == f"run={manifest['run']}"
        held = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert held == {"manifest.json", *manifest["files"]}
        rows: dict[str, int] = {}
        for name, digest in manifest["files"].items():
            assert _sha256(folder / name) == digest, f"{folder / name} is not what was committed"
            table = name.split("/")[0]
            counted = pq.ParquetFile(folder / name).metadata.num_rows
            rows[table] = rows.get(table, 0) + counted
        assert rows == manifest["rows"]
        for when in ("committed_at", "seal"):
            del manifest[when]
        text = json.dumps(manifest, sort_keys=True)
        found[manifest["run"]] = manifest["files"] | {"manifest.json": text}
    return found


def verify_checks(store: Path) -> Snapshot:
    """As :func:`verify`, and ``lever check`` finds nothing either."""
    from lever_data.report.check import check
    from lever_data.store.store import Store

    assert check(Store.open(store)).problems == ()
    return verify(store)


def is_clear(outcome: Outcome) -> bool:
    """Whether a command failed as it should: exit code 1, one ``Error:``, no traceback."""
    lines = outcome.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    return outcome.code == 1 and len(errors) == 1 and "Traceback" not in outcome.stderr


def verify_swept(store: Path) -> None:
    """After a sweep, which every writer begins with, nothing of dead writers is left."""
    assert [p.name for p in (store / "staging").iterdir()] == ["lock"]
    stray = {p.name for p in store.iterdir()} - {
        "lever.json",
        "removed",
        "runs",
        "staging",
        "views.sql",
    }
    assert not stray, f"left behind: {stray}"


def write_rl_data(path: Path, queries: int, *, seed: int = 0, shuffled: bool = False) -> Path:
    """RL data of generation 2, five candidates a query; query keys out of order if asked."""
    roll = random.Random(seed)
    order = list(range(queries))
    if shuffled:
        roll.shuffle(order)
    path.write_text(json.dumps({str(q): {"pointer_candidates": _row(roll)} for q in order}))
    return path


def _row(roll: random.Random) -> list[dict[str, object]]:
    return [
        {
            "pointer": roll.sample(range(10_000, 10_064), 2),  # no query among them
            "gen_method": "beam",
            "beam_rank": rank,
            "beam_score": roll.random(),
            "logprob_score": -roll.random(),
            "temperature": None,
            "vqa_pred_answer": roll.choice(["cat", "dog", "two", "red"]),
            "vqa_correct": (correct := roll.randrange(2)),
            "vqa_acc_score": correct * roll.choice([0.3, 0.6, 1.0]),
            "vqa_eval_mode": "file",
        }
        for rank in range(5)
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def moments(count: int, seconds: float, seed: int) -> Sequence[float]:
    """Seconds after which to kill: spread over a command's life, from its very start to its end."""
    roll = random.Random(seed)
    return [seconds * (i + roll.random()) / count for i in range(count)]


# of a room: for seconds, and at its full length
FULL = (pytest.mark.long, pytest.mark.full)
SIZES = [pytest.param(False, id="quick"), pytest.param(True, id="long", marks=FULL)]
# one that `make test` leaves out, as a room beside it goes the same way
LONG_SIZES = [pytest.param(False, id="quick", marks=pytest.mark.long), SIZES[1]]
