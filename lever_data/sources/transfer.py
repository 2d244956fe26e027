"""Runs from one store into another, folder or bucket, verified; a second call goes on.

In go two stores, out come the runs as they are: the manifest's own bytes and every file it names,
hashed on the way. A run that is there already is not sent again. A target in a folder also gets
``README.md``, a card by which ``datasets.load_dataset`` and the Hugging Face hub know its tables;
DuckDB and any other reader of Parquet need nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_data.errors import LeverError
from lever_data.store.draft import Draft
from lever_data.store.files import sha256_file, write_atomic
from lever_data.store.integrity import require_intact
from lever_data.store.manifest import MANIFEST, Run
from lever_data.store.mirror import SQL_FOLDERS
from lever_data.store.mirror_room import IMAGES
from lever_data.store.pictures import pictures_of, put_pictures
from lever_data.store.store import Store

_CARD = "README.md"
_OURS = "<!-- written by lever copy -->"

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Transfer:
    """A run, and whether it had to be sent."""

    run: Run
    is_new: bool


def transfer(
    source: Store, target: Store, runs: Sequence[str] = (), notice: Notice = lambda text: None
) -> Iterator[Transfer]:
    """Copy the named runs, or all and the user's own SQL; one by one, so that what was copied
    before an error stays.

    Raises:
        LeverError: a run is damaged, or another run of its id is there.
    """
    if source.path.resolve() == target.path.resolve():
        raise LeverError("the two are one store", where=str(source.path))
    target.make_ready()
    for run in source.select(list(runs)):
        yield _send(source, run, target)
    if not runs:
        _send_sql(source, target, notice)
    if (held := pictures_of(source.path)) is not None:
        files = sorted((held / IMAGES).iterdir())
        put_pictures(target.path, ((f"{IMAGES}/{f.name}", f.read_bytes()) for f in files))
    if target.mirror is None:
        _write_card(target, notice)


def _send(source: Store, run: Run, target: Store) -> Transfer:
    there = target.committed(run.run)
    if there is not None and there.schema_version != run.schema_version:
        return Transfer(there, is_new=False)  # the same rows, with columns named as at another time
    if there is not None and there.files != run.files:
        raise LeverError(
            "another run of this id is there, with other bytes",
            where=str(there.path),
            value=run.run,
            hint="two versions of lever wrote them: `lever runs rm` removes the one that is wrong",
        )
    if there is None or target.mirror is not None:
        require_intact([run])
    if target.mirror is not None:
        target.mirror.publish(run.path, run.run)  # what is there is completed
    elif there is None:
        with Draft(target) as draft:
            _fill(draft.folder, run)
            draft.publish(run.run)
    if source.mirror is not None:
        source.mirror.release()
    found = target.committed(run.run)
    if found is None:
        raise LeverError("the run was removed while it was copied", value=run.run)
    return Transfer(found, is_new=there is None)


def _fill(folder: Path, run: Run) -> None:
    """Copy the files of a run.

    Raises:
        LeverError: what was written is not what was committed.
    """
    for name, digest in run.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(run.path / name, folder / name)
        if sha256_file(folder / name) != digest:
            raise LeverError("a file changed while it was copied", where=str(run.path / name))
    shutil.copyfile(run.path / MANIFEST, folder / MANIFEST)


def _send_sql(source: Store, target: Store, notice: Notice) -> None:
    """The user's views, features and tests; one that is there and reads otherwise stays."""
    for path in (p for f in SQL_FOLDERS for p in sorted((source.path / f).glob("*.sql"))):
        key, text = f"{path.parent.name}/{path.name}", path.read_bytes()
        if not _put(target, key, text):
            notice(f"kept {key} as it is there: it is not the one of {source.path}")
    if target.mirror is not None:
        target.mirror.refresh()


def _put(target: Store, key: str, text: bytes) -> bool:
    """Put a file where there is none; whether it is there with these bytes now."""
    if target.mirror is not None:
        return target.mirror.bucket.create(key, text)
    path = target.path / key
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)
    return path.read_bytes() == text


def _write_card(target: Store, notice: Notice) -> None:
    """Say in ``README.md`` where the tables are, for those who know Parquet but not lever."""
    import yaml

    path = target.path / _CARD
    if path.exists() and _OURS not in path.read_text("utf-8", "replace"):
        notice(f"{path} is not lever's and stays; `datasets` needs its configs from a card")
        return
    head = yaml.safe_dump({"configs": card_configs(target.runs())}, sort_keys=False)
    text = f"---\n{head}---\n{_OURS}\n{_TEXT}"
    write_atomic(path, text.encode())


def card_configs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What a card says of the tables: one config a table, or one a run where the columns of its
    runs differ, as those of vectors do; the splits are those of the runs."""
    import pyarrow.parquet as pq

    tables = sorted({name.split("/", 1)[0] for run in runs for name in run.files})
    configs = []
    for table in tables:
        holders = [run for run in runs if run.table_files(table)]
        schemas = [pq.read_schema(run.table_files(table)[0]) for run in holders]
        if all(schema.equals(schemas[0]) for schema in schemas):
            configs.append(_config(table, table, holders))
        else:
            configs += [_config(f"{table}-{run.run}", table, [run]) for run in holders]
    for config in configs:
        if config["config_name"] == "candidates":
            config["default"] = True
    return configs


def _config(name: str, table: str, runs: Sequence[Run]) -> dict[str, Any]:
    splits: dict[str, list[str]] = {}
    for run in runs:
        split = re.sub(r"\W+", "_", run.split or "all")
        splits.setdefault(split, []).append(f"runs/run={run.run}/{table}/*.parquet")
    files = [{"split": split, "path": paths} for split, paths in splits.items()]
    return {"config_name": name, "data_files": files}


_TEXT = """
# A store of lever

Every folder below `runs/` is one run: a manifest with the sha256 of every file, and its tables as
Parquet. `candidates` are pointers to demonstrations with what a model answered when it was shown
them, `queries` and `examples` what they are about.

    duckdb -c "select * from 'runs/*/candidates/*.parquet' limit 5"
    duckdb -init views.sql
    lever audit --store .

    from datasets import load_dataset
    rows = load_dataset(".", "candidates")
"""
