"""What figures were made from: every file and run that went in, by role, with its digest.

In go the names a user gave, each with its role; out come records for a manifest or a file beside
the result. Two evaluations that differ in one input differ in one line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lever_data.catalog import RL_KINDS
from lever_data.relations.db import open_session
from lever_data.store.files import sha256_file
from lever_data.store.store import Store

Input = dict[str, str]  # role, path, sha256


def input_records(named: Mapping[str, str | Path | None], store: Store) -> list[Input]:
    """Role, path and the file's own sha256 of every input that is named.

    Args:
        named: role → a file, the name of embeddings in the store, or nothing.
        store: where names are looked up.
    """
    found: list[Input] = []
    for role, source in named.items():
        if source is None:
            continue
        # several stand side by side, see `load_embeddings`
        parts = [str(source)] if Path(source).is_file() else str(source).split(",")
        for part in map(str.strip, parts):
            path = Path(part)
            if path.is_file():
                found.append({"role": role, "path": part, "sha256": sha256_file(path)})
                continue
            con = open_session(store, only=("embeddings",)).con
            sql = "select distinct run from embeddings where name = ? order by run"
            for (run,) in con.execute(sql, [part]).fetchall():
                found += [
                    {"role": role, "path": f"{run}/{file}", "sha256": digest}
                    for file, digest in store.run(run).files.items()
                ]
    return found


def parents_of(
    store: Store, runs: Sequence[str], dataset: str, splits: Sequence[str], *, pools_of: str | None
) -> tuple[str, ...]:
    """The runs that the items of some splits, and the pools of ``pools_of``, come from."""
    return tuple(
        run.run
        for run in store.select(list(runs))
        if run.dataset == dataset
        and (
            (run.kind == "examples" and run.split in splits)
            or (run.kind in RL_KINDS and run.split == pools_of)
        )
    )


def said(records: Sequence[Mapping[str, Any]]) -> str:
    """Inputs in a line, for the head of a page."""
    return ", ".join(f"{r['role']} `{r['path']}` ({r['sha256'][:12]})" for r in records)
