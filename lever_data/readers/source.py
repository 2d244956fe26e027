"""Open a source file: plain, gzip or zstd, told apart by content and never by name.

In goes a path, out comes a :class:`Source` with the file's identity (sha256, size) and a
:class:`ByteReader` that yields the uncompressed bytes and knows both its positions, in the file
and in the uncompressed stream.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import stat
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self, cast

import pyarrow as pa

from lever_data.errors import LeverError, UsageError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 18

Progress = Callable[[int, int], None]  # bytes of the file read, bytes of the file in all


class _Raw(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """A file to ingest; ``path`` as the user gave it, ``size`` in bytes as it lies on disk."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Look at a file.

        Raises:
            LeverError: it is missing, empty, no regular file, or cannot be read.
        """
        path = Path(path)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise LeverError(
                    "lever ingests regular files",
                    where=str(path),
                    hint="name the files one by one (a shell pattern will do); write a pipe to "
                    "a file first",
                )
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            kind = UsageError if isinstance(error, FileNotFoundError) else LeverError
            raise kind(f"the file cannot be read ({error.strerror})", where=str(path)) from error
        if status.st_size == 0:
            raise LeverError("the file is empty", where=str(path))
        return cls(path, status.st_size, status.st_mtime_ns)

    def reader(self, progress: Progress | None = None) -> ByteReader:
        """A reader of the uncompressed bytes from the start."""
        return ByteReader(self, progress)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Path]:
        """The path of the uncompressed content: the file itself, or a temporary copy."""
        with self.reader() as reader:
            if not reader.is_compressed:
                yield self.path
                return
            with tempfile.NamedTemporaryFile(prefix="lever-") as copy:
                while data := reader.read(_CHUNK):
                    copy.write(data)
                copy.flush()
                yield Path(copy.name)

    def sha256(self) -> str:
        """Hex sha256 of the file as it lies on disk (compressed, where it is)."""
        with self.path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def check_unchanged(self) -> None:
        """Raise where the file was written to since it was opened."""
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise LeverError(
                "the file changed while it was read; nothing of it was committed",
                where=str(self.path),
                hint="wait until its writer is done",
            )


class BackgroundHash:
    """The sha256 of a source, computed on a thread while the file is parsed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._digest: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # result() reports it
            self._digest = self._source.sha256()

    def result(self) -> str:
        """Wait for the digest; raises where the file changed or could not be read again."""
        self._thread.join()
        self._source.check_unchanged()
        if self._digest is None:
            raise LeverError("the file cannot be read again", where=str(self._source.path))
        return self._digest


class ByteReader:
    """Uncompressed bytes of a source, in order.

    Attributes:
        offset: uncompressed bytes given out so far.
        is_compressed: whether the file is gzip or zstd.
    """

    def __init__(self, source: Source, progress: Progress | None = None) -> None:
        self.source = source
        self.offset = 0
        self._file = _CountedFile(source, progress)
        magic = self._file.peek(4)
        if magic.startswith(GZIP_MAGIC):
            self._stream: _Raw = _GzipStream(self._file)
        elif magic.startswith(ZSTD_MAGIC):
            self._stream = _ZstdStream(self._file)
        else:
            self._stream = self._file
        self.is_compressed = self._stream is not self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; ``b""`` at the end of the data only.

        Raises:
            LeverError: the compressed data is damaged or cut short; it says at which byte.
        """
        try:
            data = self._stream.read(size)
        except (zlib.error, EOFError, OSError) as error:
            raise LeverError(
                f"the compressed data is damaged or cut short ({error})",
                where=f"{self.source.path}, compressed byte {self._file.position}, "
                f"uncompressed byte {self.offset}",
                hint="copy or download the file again; --salvage keeps what is whole",
            ) from error
        self.offset += len(data)
        return data


class _CountedFile(io.RawIOBase):
    """A file that counts what was read from it and reports it."""

    def __init__(self, source: Source, progress: Progress | None) -> None:
        self._handle = source.path.open("rb")
        self._size = source.size
        self._progress = progress
        self.position = 0

    def peek(self, size: int) -> bytes:
        return self._handle.peek(size)[:size]

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._handle.read(size)
        self.position += len(data)
        if self._progress is not None:
            self._progress(self.position, self._size)
        return data

    def close(self) -> None:
        self._handle.close()
        super().close()


class _GzipStream:
    """Gzip members one after another, their checksums verified by the library."""

    def __init__(self, file: _CountedFile) -> None:
        self._stream = gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb")

    def read(self, size: int = -1, /) -> bytes:
        return self._stream.read1(size)  # read() would lose what stands before a damage


class _ZstdStream:
    """Zstandard frames one after another, inflated by Arrow."""

    def __init__(self, file: _CountedFile) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self._stream.read(size)
        return data
