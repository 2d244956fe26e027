"""What a run is: its specification before it is written, its record after.

In goes ``manifest.json``, out comes a :class:`Run`. The id of a run follows from what it is made
of (:class:`RunSpec`), so the same source with the same parameters is the same run.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError
from lever_data.schema import SCHEMA_VERSION

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
            "schema": SCHEMA_VERSION,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        words = [self.kind, self.dataset, self.split]
        return "-".join([*(_slug(w) for w in words if w), digest])


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", word.lower()).strip("_")[:40] or "x"


def read_manifest(folder: Path) -> Run | None:
    """The run in ``folder``; ``None`` where it was removed while we looked."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        run = Run(
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
        )
    except FileNotFoundError:
        if not folder.exists():
            return None
        raise LeverError("a run has no manifest", where=str(path), hint=_REMOVE_HINT) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LeverError(
            f"a run's manifest is damaged ({type(error).__name__}: {error})",
            where=str(path),
            hint=_REMOVE_HINT,
        ) from error
    if f"run={run.run}" != folder.name:
        raise LeverError("a run's folder and manifest disagree", where=str(path), value=run.run)
    return run


_REMOVE_HINT = "restore the folder from a copy, or move it out of runs/ and ingest the source again"
