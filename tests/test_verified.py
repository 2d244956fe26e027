"""Files are hashed once on a machine, and again as soon as anything was done to them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import open_session
from lever_data.store import verified
from lever_data.store.files import sha256_file
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, Store
from tests.commands import lever
from tests.stores import candidate, commit, new_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LEVER_VERIFY", "once")
    return tmp_path / "cache" / "lever" / "verified"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store whose files have been lying for an hour."""
    store = new_store(tmp_path)
    commit(store, [candidate(0, i, [i + 1], score=1.0) for i in range(3)])
    _age(store.runs()[0])
    return store


def _age(run: Run) -> None:
    for name in run.files:
        os.utime(run.path / name, (time.time() - 3600,) * 2)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files that were hashed; a file is old at once, as its change time cannot
    be set."""
    seen: list[str] = []
    real = sha256_file

    def watched(path: Path) -> str:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(verified, "sha256_file", watched)
    monkeypatch.setattr(verified, "_SETTLED", -1)
    yield seen


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_file_is_hashed_once(store: Store, hashed: list[str]) -> None:
    for _ in range(3):
        open_session(store)
    assert len(hashed) == len(store.runs()[0].files)


def test_a_file_that_was_touched_is_hashed_again(store: Store, hashed: list[str]) -> None:
    (run,) = store.runs()
    require_intact([run])
    name = sorted(run.files)[0]
    hashed.clear()
    os.utime(run.path / name)
    require_intact([run])
    assert hashed == [Path(name).name]


@pytest.mark.parametrize("change", ["flipped", "cut", "gone", "replaced with its times kept"])
def test_damage_after_a_verification_is_seen(store: Store, hashed: list[str], change: str) -> None:
    (run,) = store.runs()
    require_intact([run])
    path = run.path / next(n for n in run.files if n.startswith("candidates"))
    before = path.stat()
    if change == "flipped":
        _flip(path)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "gone":
        path.unlink()
    else:
        copy = path.with_suffix(".copy")
        copy.write_bytes(path.read_bytes())
        _flip(copy)
        copy.replace(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(LeverError, match=r"is missing|is not what was committed"):
        open_session(store)


@pytest.mark.slow
def test_full_and_check_trust_nothing(
    store: Store, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that turned over on the disk leaves no trace in what the system says of the file."""
    (run,) = store.runs()
    path = run.path / next(n for n in run.files if n.startswith("candidates"))
    kept = verified._stamp(path)
    require_intact([run])
    _flip(path)
    monkeypatch.setattr(
        verified, "_stamp", lambda p, real=verified._stamp: kept if p == path else real(p)
    )
    require_intact([run])  # what is promised ends here
    words = ["query", "select count(*) from all_candidates", "--store", store.path]
    assert "not what was committed" in lever("--verify", "full", *words, check=False).stderr
    monkeypatch.setenv("LEVER_VERIFY", "full")
    with pytest.raises(LeverError, match="not what was committed"):
        require_intact([run])
    monkeypatch.setenv("LEVER_VERIFY", "once")
    assert lever("check", "--store", store.path, check=False).returncode == 1


def test_what_is_remembered_is_of_files_at_rest(
    store: Store, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Two writes within one tick of the clock look alike: a fresh file is not remembered."""
    monkeypatch.setattr(verified, "_SETTLED", 3600 * 10**9)
    require_intact(store.runs())
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": [1]}'])
def test_a_broken_memory_only_costs_time(
    store: Store, hashed: list[str], cache: Path, content: str
) -> None:
    require_intact(store.runs())
    (file,) = cache.iterdir()
    file.write_text(content)
    hashed.clear()
    require_intact(store.runs())
    assert len(hashed) == len(store.runs()[0].files)


def test_files_that_are_gone_are_forgotten(store: Store, hashed: list[str], cache: Path) -> None:
    require_intact(store.runs())
    (first,) = store.runs()
    second = commit(store, [candidate(9, 0, [1], score=1.0)], name="b")
    store.remove(first.run)
    require_intact([second])
    (file,) = cache.iterdir()
    assert all(second.run in path for path in json.loads(file.read_text()))


def test_a_cache_that_cannot_be_written_is_no_error(
    store: Store, hashed: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    require_intact(store.runs())
    require_intact(store.runs())
    assert len(hashed) == 2 * len(store.runs()[0].files)
