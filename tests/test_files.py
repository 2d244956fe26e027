"""Files that a user names for output: written whole, and nothing else is replaced."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.store import spill
from lever_data.store.files import writing
from tests.commands import lever
from tests.stores import new_store


def write(path: Path, data: bytes = b"new") -> None:
    with writing(path) as file:
        file.write(data)


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(30)
    assert found == [b"new"]
    assert pipe.is_fifo()


def test_a_full_device_is_an_error_and_stays_a_device() -> None:
    with pytest.raises(LeverError, match="No space left on device"):
        write(Path("/dev/full"))
    assert Path("/dev/full").is_char_device()


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), writing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words",
    [
        ("query", "select 1 as a", "--format", "csv", "--out"),
        ("export", "--run", "beam", "--out"),
        ("convert", "best.pt", "--out"),
        ("diff", "a", "b", "--json"),
        ("audit", "--html"),
    ],
)
def test_a_folder_for_a_file_and_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEVER_STORE", str(new_store(tmp_path).path))
    for name, what in ((".", "a folder stands"), ("no/where.csv", "no such folder")):
        done = lever(*words, name, check=False)
        assert done.returncode != 0
        assert what in done.stderr, done.stderr


def test_a_spill_folder_may_go_while_another_process_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, left = tmp_path / "lever-spill-gone", tmp_path / "lever-spill-left"
    left.mkdir()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone, left]))
    spill._sweep(tmp_path)
    assert not left.exists()
