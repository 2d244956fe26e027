"""Bits flipped, files cut short or gone: a clear error, and the other runs stay readable."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lever_data import connect
from lever_data.errors import LeverError
from lever_data.relations.db import open_session
from lever_data.sources.export import export
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Run, Store
from tests.torture.conftest import Report
from tests.torture.harness import SIZES, Nursery, verify, write_rl_data

ALL = "select * from all_candidates order by all"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of two runs of the same queries under different names."""
    made = Store.create(tmp_path / "store")
    for name in ("bad", "good"):
        source = write_rl_data(tmp_path / f"{name}.json", 300)
        assert [
            r.is_new for r in ingest([source], made, IngestOptions(dataset=name, split="train"))
        ] == [True]
    return made


def _bad_and_good(store: Store) -> tuple[Run, Run]:
    by_name = {run.dataset: run for run in store.runs()}
    return by_name["bad"], by_name["good"]


@pytest.mark.slow
@pytest.mark.parametrize("long", SIZES)
def test_no_flipped_bit_goes_unseen(store: Store, report: Report, long: bool) -> None:
    bad, good = _bad_and_good(store)
    expected = connect(store, runs=[good.run]).execute(ALL).fetchall()
    roll = random.Random(0)
    places: Counter[str] = Counter()
    for _ in range(5_000 if long else 80):
        path = roll.choice([p for p in sorted(bad.path.rglob("*")) if p.is_file()])
        whole = path.read_bytes()
        at, bit = roll.randrange(len(whole)), roll.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        places[path.name] += 1
        if path.name != "manifest.json" or not _same_json(path.read_bytes(), whole):
            with pytest.raises(LeverError, match=f"run {bad.run} "):
                open_session(store, only=["all_candidates", "queries"])
            with pytest.raises(LeverError, match=f"run {bad.run} "):
                export(store, bad.run, store.path.parent / "out.json")
        path.write_bytes(whole)
    assert connect(store, runs=[good.run]).execute(ALL).fetchall() == expected
    assert not (store.path.parent / "out.json").exists()
    report(f"{places.total()} flipped bits seen ({dict(places)})")
    assert len(places) == 2


def _same_json(one: bytes, two: bytes) -> bool:
    """Whether a flip changed white space alone."""
    try:
        same: bool = json.loads(one) == json.loads(two)
    except ValueError:
        return False
    return same


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other_file(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE: list[Callable[[Path], None]] = [Path.unlink, _cut, _empty, _folder, _other_file]
FILES = ["manifest.json", "candidates/part-00000.parquet", "queries/part-00000.parquet"]


KEPT = [(FILES[0], _cut), (FILES[1], Path.unlink), (FILES[2], _other_file)]  # in `make test`
CASES = [
    pytest.param(
        name,
        damage,
        id=f"{damage.__name__.strip('_')} {name.split('/')[0]}",
        marks=[] if (name, damage) in KEPT else pytest.mark.long,
    )
    for name in FILES
    for damage in DAMAGE
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_named_and_the_rest_is_readable(
    store: Store, nursery: Nursery, name: str, damage: Callable[[Path], None]
) -> None:
    bad, good = _bad_and_good(store)
    damage(bad.path / name)
    where = ("--store", store.path)
    everything = nursery.run("views", *where)
    assert everything.code == 1
    assert everything.stderr.startswith("Error: ") and bad.run in everything.stderr
    assert "Hint: " in everything.stderr and "Traceback" not in everything.stderr
    session = open_session(store, runs=[good.run], only=["all_candidates"])
    assert session.con.execute("select count(*) from all_candidates").fetchall() == [(1500,)]
    checked = nursery.run("check", *where)
    assert checked.code == 1
    assert bad.run in checked.stdout + checked.stderr and "Traceback" not in checked.stderr
    listed = nursery.run("runs", *where, "--json", "-")
    assert good.run in {r["run"] for r in json.loads(listed.stdout)}
    assert listed.code == (1 if name == "manifest.json" else 0)
    assert nursery.run("runs", "rm", bad.run, *where).code == 0
    assert list(verify(store.path)) == [good.run]


def test_a_vanished_run_is_no_run(store: Store, nursery: Nursery) -> None:
    bad, good = _bad_and_good(store)
    shutil.rmtree(bad.path)
    listed = nursery.run("runs", "--store", store.path, "--json", "-")
    assert [r["run"] for r in json.loads(listed.stdout)] == [good.run]
    shown = nursery.run("runs", "show", bad.run, "--store", store.path)
    assert (shown.code, "there is no such run" in shown.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 3}', b"[" * 100_000, b"\xff"])
def test_a_store_whose_marker_is_damaged_says_so(
    store: Store, nursery: Nursery, content: bytes
) -> None:
    (store.path / "lever.json").write_bytes(content)
    for words in (["runs"], ["ingest", store.path.parent / "good.json"]):
        done = nursery.run(*words, "--store", store.path)
        assert done.code == 1
        assert done.stderr.startswith("Error: ") and "lever.json" in done.stderr
        assert "Traceback" not in done.stderr
