"""What the pages read: the store's intact runs, a session over them, and surveys of views.

In goes a store; out come a :class:`Board` and what it knows of the store as it is now. Runs that
are damaged are left out, and every page says which. Nothing is written into the store.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place
from lever_data.relations.db import Session, open_session
from lever_data.relations.query_options import QueryOptions
from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.options import AuditRequest, DiffRequest
from lever_data.store.integrity import require_intact
from lever_data.store.spill import new_spill_folder
from lever_data.store.store import Run, Store

MEMORY = "250MB"  # DuckDB's, in this process; what needs more has a process of its own
PATIENCE = 20.0  # seconds a request waits for a survey before it says that it is being made


class State:
    """The store at one time: its runs, those that are damaged with why, and a session."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        found = store.inventory()
        self.damaged: dict[str, LeverError] = dict(found.damaged)
        for run in found.runs:
            try:
                require_intact([run])
            except LeverError as error:
                self.damaged[run.run] = error
        self.all_runs = found.runs
        self.runs = [run for run in found.runs if run.run not in self.damaged]
        self.counts: dict[str, int] = {}  # rows by the SELECT that counts them
        self._opening = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The runs that figures are made of."""
        return tuple(run.run for run in self.runs)

    @cached_property
    def _session(self) -> Session:
        session = open_session(self.store, runs=self.names)
        session.con.execute("set memory_limit = ?", [MEMORY])
        return session

    def session(self) -> Session:
        """Every relation over the intact runs; take a cursor of its connection.

        Raises:
            LeverError: the store holds no run that can be read.
        """
        if not self.runs:
            raise LeverError(
                "the store has no runs yet",
                where=str(self.store.path),
                hint="`lever ingest FILE` brings RL data, questions and answers in",
            )
        with self._opening:
            return self._session

    def kind(self, *kinds: str) -> list[Run]:
        """The intact runs of these kinds, newest first."""
        return [run for run in reversed(self.runs) if run.kind in kinds]

    def query_options(self) -> QueryOptions:
        """Scope and limits of a query of the reader's own."""
        return QueryOptions(runs=self.names, timeout=60.0, memory=1.0)


class Board:
    """A store to look at.

    Args:
        store: the store.
        images: where the pictures of the data sets lie; ``None``: none are shown.
        trainings: folders that `lever train` writes now.
    """

    def __init__(
        self, store: Store, images: Path | None = None, trainings: Sequence[Path] = ()
    ) -> None:
        self.store, self.images, self.trainings = store, images, tuple(trainings)
        self.folder = new_spill_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._state: tuple[str, State] | None = None
        self._jobs: dict[Path, subprocess.Popen[bytes]] = {}
        self._picking: subprocess.Popen[bytes] | None = None  # the last one that makes picks

    def state(self) -> State:
        """The store as it is now; made anew where a run came, went or changed."""
        if self.store.mirror is not None:
            self.store.mirror.refresh()
            self.store.mirror.refresh_runs()
        key = _fingerprint(self.store)
        with self._lock:
            if self._state is None or self._state[0] != key:
                self._state = key, State(self.store, self.folder / key)
            return self._state[1]

    def place(self, dataset: str, split: str) -> Place:
        """Where the items of a split come from."""
        return Place(dataset, split, self.images)

    def survey(self, state: State, view: str, reward: RewardSpec) -> Survey | None:
        """The audit of a view and what its pages list; ``None`` while it is being made.

        Raises:
            LeverError: the audit refuses the view or the reward.
        """
        request = AuditRequest(view=view, reward=reward, runs=state.names)
        made = self._made(state, "audit", request.model_dump_json())
        return None if made is None else Survey(*made)

    def difference(self, state: State, a: str, b: str) -> dict[str, Any] | None:
        """How two sides differ, as `lever diff` says; ``None`` while it is being computed.

        Raises:
            LeverError: the two cannot be compared.
        """
        request = DiffRequest(a=a, b=b, runs=state.names)
        made = self._made(state, "diff", request.model_dump_json())
        return None if made is None else made[1]

    def picks(self, state: State, words: str, *, is_patient: bool) -> list[dict[str, Any]] | None:
        """What checkpoints pick, one answer to each question of ``words``; ``None`` while they are
        being made, but for a reader who ``is_patient``.

        Raises:
            LeverError: the process ended without a result.
        """
        made = self._made(state, "picks", words, None if is_patient else 0.0)
        return None if made is None else list(made[1]["picks"])

    def _made(
        self, state: State, kind: str, words: str, patience: float | None = PATIENCE
    ) -> tuple[Path, dict[str, Any]] | None:
        """What a process of its own made, which may take gigabytes for a moment: its folder and
        its answer. It is asked once for each state of the store."""
        folder = state.folder / sha256(f"{kind} {words}".encode()).hexdigest()[:16]
        with self._lock:
            if folder not in self._jobs:
                busy = self._picking is not None and self._picking.poll() is None
                if kind == "picks" and busy:
                    return None  # one such process at a time: it holds a whole split's vectors
                folder.mkdir(parents=True, exist_ok=True)
                asked = {"store": str(self.store.path.resolve()), "kind": kind, "request": words}
                (folder / "request.json").write_text(json.dumps(asked))
                command = [sys.executable, "-P", "-m", "lever_board.job", str(folder)]
                self._jobs[folder] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                if kind == "picks":
                    self._picking = self._jobs[folder]
            child = self._jobs[folder]
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        return folder, _answer(folder, child)

    def close(self) -> None:
        """End what is being made."""
        for child in self._jobs.values():
            child.kill()
            child.wait()


@dataclass(frozen=True)
class Survey:
    """An audit's figures and SQL, and beside it ``queries.parquet`` and ``examples.parquet``."""

    folder: Path
    audit: dict[str, Any]

    @contextmanager
    def tables(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with ``survey_queries`` and ``survey_examples``."""
        with duckdb.connect() as con:
            for name in ("queries", "examples"):
                file = str(self.folder / f"{name}.parquet").replace("'", "''")
                con.execute(f"create view survey_{name} as from read_parquet('{file}')")
            yield con


def _answer(folder: Path, child: subprocess.Popen[bytes]) -> dict[str, Any]:
    file = folder / "answer.json"
    if not file.exists():
        raise LeverError(
            "the process that computes this ended without a result",
            value=f"status {child.returncode}",
            hint="was it out of memory? `lever audit` and `lever diff` show more",
        )
    found: dict[str, Any] = json.loads(file.read_bytes())
    if error := found.get("error"):
        kind = UsageError if error.pop("is_usage") else LeverError
        raise kind(error.pop("what"), **error)
    return found


def _fingerprint(store: Store) -> str:
    """What changes with any file of the runs, without reading one."""
    digest = sha256()
    for folder in sorted((store.path / "runs").glob("run=*")):
        for file in [folder, *sorted(folder.rglob("*"))]:
            try:
                stat = file.stat()
            except FileNotFoundError:
                continue
            digest.update(f"{file} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    for file in sorted((store.path / "views").glob("*.sql")):
        digest.update(f"{file} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
