"""A second process that decodes blocks of legacy data beside this one.

In go the bytes of a block and a :class:`~lever_data.sources.block.State`; out come the Arrow
batches it made, or the word that it refused. Decoding holds the interpreter's lock, so a
thread would not help. The process imports neither DuckDB nor pandas; ``process.py`` starts it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.sources import process
from lever_data.sources.block import Decoded, State
from lever_data.sources.layout import Built, RefusedError
from lever_data.store import schema

START_WAIT = 0.0  # seconds to wait for its start; tests wait, so that it takes part in small files


class Helper:
    """The other process, seen from this one. Use it as a context manager."""

    def __init__(self) -> None:
        worker = process.take()
        self._process, self._channel = worker.process, worker.channel
        self._sender = ThreadPoolExecutor(1, "to helper")  # the next block is there before the
        self._receiver = ThreadPoolExecutor(1, "from helper")  # answer to the last is read
        self._has_started: bool | None = None
        self._answers: deque[Future[Decoded]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()  # it holds nothing; this also frees a thread that waits for it
        self._sender.shutdown(cancel_futures=True)
        self._receiver.shutdown(cancel_futures=True)
        self._channel.close()

    def kill(self) -> None:
        """End the process; what was submitted and is not done becomes an error."""
        self._process.kill()
        self._process.wait()

    def is_ready(self) -> bool:
        """Whether it has started; never, where it could not: then this process works alone."""
        if self._has_started is None and self._channel.has_message(START_WAIT):
            try:
                self._has_started = bool(self._channel.receive()[0])
            except (EOFError, OSError):
                self._has_started = False
        return bool(self._has_started)

    def submit(self, parts: Sequence[bytes | memoryview], state: State) -> Future[Decoded]:
        """Decode a block's text, which may come in parts, over there.

        The result raises RefusedError as ``try_block`` does, LeverError where the process ended.
        """
        self._sender.submit(self._send, parts, state)
        self._answers.append(self._receiver.submit(self._receive))
        return self._answers[-1]

    @property
    def load(self) -> int:
        """Blocks submitted whose answer is not here yet."""
        while self._answers and self._answers[0].done():
            self._answers.popleft()
        return len(self._answers)

    def _send(self, parts: Sequence[bytes | memoryview], state: State) -> None:
        with suppress(OSError):  # it ended: the receiver finds that out, too, and says so
            self._channel.send(state, *parts)

    def _receive(self) -> Decoded:
        try:
            answer, candidates = self._channel.receive()
            queries = b"" if answer is None else self._channel.receive()[1]
        except (EOFError, OSError) as error:
            raise LeverError(
                "the process that helps to decode ended", hint="is there memory left?"
            ) from error
        if answer is None:
            raise RefusedError("refused by the helper")
        tokens, non_finite = answer
        built = Built(
            _unpack(candidates, schema.CANDIDATES), _unpack(queries, schema.QUERIES), tokens
        )
        return built, non_finite


def _unpack(data: bytes, table: pa.Schema) -> pa.RecordBatch:
    return pa.ipc.read_record_batch(pa.py_buffer(data), table)
