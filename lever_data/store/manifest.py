"""What a run is: its specification before it is written, its record after.

In goes ``manifest.json``, out comes a :class:`Run`. It holds the sha256 of every file of the run,
and under ``seal`` its own: one that was altered or cut short is not read. The id of a run follows
from what it is made of (:class:`RunSpec`), so the same source with the same parameters is the same
run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError, UsageError

SCHEMA_VERSION = 2  # of the tables in schema.py; here, so that no manifest waits for pyarrow
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Run:
    """One committed run, as its manifest describes it.

    ``rows`` counts rows per table; ``parameters`` is what, with the source, the id derives from;
    ``details`` holds what the kind needs besides (the layout of the legacy file, counts of nulls).
    """

    run: str
    kind: str
    dataset: str | None
    split: str | None
    committed_at: str
    rows: dict[str, int]
    files: dict[str, str]
    query_range: tuple[int, int] | None
    source: dict[str, Any]
    parameters: dict[str, Any]
    parents: tuple[str, ...]
    details: dict[str, Any]
    path: Path = field(repr=False)
    schema_version: int = SCHEMA_VERSION

    @property
    def has_older_names(self) -> bool:
        """Whether columns of its files have the names of before (``lever_data/older.py``)."""
        return self.schema_version < 2

    @property
    def place(self) -> tuple[str, str]:
        """Its place among all runs, oldest first: the time of its commit and its id. A compacted
        run stands where the newest of its members stood."""
        return self.details.get("stands_at", self.committed_at), self.run

    @property
    def num_rows(self) -> int:
        """Rows of the run's main table (candidates, else examples, else the only one)."""
        for table in ("candidates", "examples"):
            if table in self.rows:
                return self.rows[table]
        return next(iter(self.rows.values()), 0)

    def table_files(self, table: str) -> list[Path]:
        """The Parquet files of one table, in order; empty where the run has no such table."""
        return [self.path / f for f in sorted(self.files) if f.split("/", 1)[0] == table]


@dataclass(frozen=True)
class RunSpec:
    """What a run will be, before it is written.

    The id of the run is a hash of ``kind, dataset, split, source_sha256, parameters, parents``:
    the same source with the same parameters is the same run.
    """

    kind: str
    dataset: str | None
    split: str | None
    source: dict[str, Any] = field(default_factory=dict)  # path, sha256, bytes: for people
    source_sha256: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()

    def run_id(self) -> str:
        """``<kind>-<dataset>-<split>-<12 hex digits>``; never only digits, safe as a folder."""
        identity = {
            "kind": self.kind,
            "dataset": self.dataset,
            "split": self.split,
            "source": self.source_sha256,
            "parameters": self.parameters,
            "parents": list(self.parents),
            "schema": 1,  # new names of columns are no other run
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        words = [self.kind, self.dataset, self.split]
        return "-".join([*(_slug(w) for w in words if w), digest])


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", word.lower()).strip("_")[:40] or "x"


@dataclass(frozen=True)
class Inventory:
    """What lies in runs/: the runs, oldest first (then by id), and by id why others are damaged.

    ``hidden`` are whole, too, but a compacted run holds their rows: they are read where they are
    named, and nowhere else.
    """

    runs: list[Run]
    damaged: dict[str, LeverError]
    hidden: list[Run] = field(default_factory=list)

    def name_of(self, run_id: str) -> str:
        """The id that is ``run_id``, or else the only one that begins with it.

        Raises:
            UsageError: there is none, or there are several.
        """
        names = [*(r.run for r in self.runs), *self.damaged]
        hidden = [run.run for run in self.hidden]
        matches = (
            [n for n in (*names, *hidden) if n == run_id]
            or [n for n in names if run_id and n.startswith(run_id)]
            or [n for n in hidden if run_id and n.startswith(run_id)]
        )
        if len(matches) == 1:
            return matches[0]
        problem = "several runs begin like this" if matches else "there is no such run"
        listed = ", ".join(matches or names) or "none"
        raise UsageError(problem, value=run_id, hint=f"runs of the store: {listed}")


def read_inventory(folder: Path) -> Inventory:
    """Every run below ``folder`` (runs/ of a store) that can be read, and the damaged ones."""
    runs: list[Run] = []
    damaged: dict[str, LeverError] = {}
    for path in sorted(folder.glob("run=*")):
        try:
            run = read_manifest(path)
        except LeverError as error:
            damaged[path.name.removeprefix("run=")] = error
        else:
            runs += [run] if run is not None else []
    return Inventory(sorted(runs, key=lambda run: run.place), damaged)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as JSON will give it back, with ``seal``, the sha256 of the rest of it."""
    plain: dict[str, Any] = json.loads(to_json(manifest))  # keys become text, tuples lists
    return {**plain, "seal": hashlib.sha256(to_json(plain)).hexdigest()}


def to_json(value: object) -> bytes:
    """JSON for people and for hashing: keys sorted, indented, pure ASCII.

    ASCII because text from a source may hold half a surrogate pair, which UTF-8 cannot.
    """
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")


def read_manifest(folder: Path) -> Run | None:
    """The run in ``folder``; ``None`` where it was removed while we looked.

    Raises:
        LeverError: it is missing, is not what the commit wrote, or is a newer lever's.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        if sealed({k: v for k, v in raw.items() if k != "seal"})["seal"] != raw["seal"]:
            raise ValueError("it was changed after the commit")
        if raw["schema_version"] > SCHEMA_VERSION:
            raise _newer(path, raw)
        return _to_run(raw, folder)
    except FileNotFoundError:
        if not folder.exists():
            return None
        raise _damaged(path, "it is missing") from None
    except KeyError as error:
        raise _damaged(path, f"it has no {error}: lever did not write it") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _to_run(raw: dict[str, Any], folder: Path) -> Run:
    if folder.name != f"run={raw['run']}":
        raise ValueError(f"it is of run {raw['run']}")
    if odd := [f for f in raw["files"] if not PART.fullmatch(f)]:
        raise ValueError(f"it names a file that is not part of a table: {odd[0]!r}")
    return Run(
        run=raw["run"],
        kind=raw["kind"],
        dataset=raw["dataset"],
        split=raw["split"],
        committed_at=raw["committed_at"],
        rows=raw["rows"],
        files=raw["files"],
        query_range=tuple(raw["query_range"]) if raw["query_range"] else None,
        source=raw["source"],
        parameters=raw["parameters"],
        parents=tuple(raw["parents"]),
        details=raw["details"],
        path=folder,
        schema_version=raw["schema_version"],
    )


def _newer(path: Path, raw: dict[str, Any]) -> LeverError:
    return LeverError(
        f"a newer lever ({raw.get('lever_version')}) wrote this run: schema "
        f"{raw['schema_version']}, and this one reads up to {SCHEMA_VERSION}",
        where=str(path),
        hint="use the lever that wrote it; name other runs with --run to go on without it",
    )


def _damaged(path: Path, why: str) -> LeverError:
    run = path.parent.name.removeprefix("run=")
    return LeverError(
        f"the manifest of run {run} is damaged ({why})",
        where=str(path),
        hint=f"name other runs with --run to go on without it; `lever runs rm {run}` removes it, "
        "then make it again; or restore the folder from a copy",
    )


PART = re.compile(r"[a-z_]+/part-\d{5}\.parquet")
