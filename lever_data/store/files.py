"""Files that survive a crash: hashed, written whole or not at all, flushed to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lever_data.errors import LeverError


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def _temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def is_temporary(path: Path) -> bool:
    """Whether a file has the name under which one is written before it appears under its own."""
    return _TEMPORARY.fullmatch(path.name) is not None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones."""
    write_by_way_of(_temporary_of(path), path, data)


def write_by_way_of(temporary: Path, path: Path, data: bytes) -> None:
    """Like ``write_atomic``, with a temporary file of the caller's on the same file system.

    Raises:
        OSError: it cannot be written; the old bytes stay and the temporary file is gone.
    """
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        discard(temporary)
    fsync_dir(path.parent)


def discard(path: Path) -> None:
    """Delete a temporary file if it is there and can be deleted.

    Where the file system is read-only or gone, the error that brought us here says more.
    """
    with suppress(OSError):
        path.unlink()


def fsync_dir(path: Path) -> None:
    """Flush a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and the folder itself, to disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        fsync_dir(path)


def require_writable(paths: Iterable[Path]) -> None:
    """Refuse files that cannot be written, before what is to be written takes its time.

    Raises:
        LeverError: the folder is not there or not writable, or the path is a folder.
    """
    for path in paths:
        folder = Path(os.path.realpath(path)).parent
        if path.is_dir():
            what, hint = "a folder stands where the file is to be written", "name a file in it"
        elif _is_special(path):
            continue
        elif not folder.is_dir():
            what, hint = "there is no such folder to write to", f"`mkdir -p {folder}`"
        elif not os.access(folder, os.W_OK | os.X_OK):
            is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
            reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
            what, hint = f"the folder is not writable ({reason})", "name a file elsewhere"
        else:
            continue
        raise LeverError(what, where=str(path), hint=hint)


def _is_special(path: Path) -> bool:
    """Whether a pipe, a device or the like stands there, which must not be replaced."""
    return path.exists() and not path.is_file()


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing whole: it appears under its name only when the block ends well.

    Of a link the file it points to is replaced; a pipe or a device is written to as it is.

    Raises:
        LeverError: the file cannot be made or written.
    """
    require_writable([path])
    try:
        if _is_special(path):
            with path.open("wb") as handle:
                yield handle
            return
        with _replacing(Path(os.path.realpath(path))) as handle:
            yield handle
    except OSError as error:
        raise LeverError(
            f"the file cannot be written ({error.strerror or error})", where=str(path)
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON for people, whole or not at all; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    with writing(path) as file:
        file.write(f"{text}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with writing(path) as file:
        file.write(text.encode())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    temporary = _temporary_of(path)
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        discard(temporary)
