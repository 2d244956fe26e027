"""Decode a few blocks ahead, on this thread and in a second process where there is a core for it.

In go blocks in file order; out come, in the same order, the blocks and what came of decoding
each. Which process takes a block does not change the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack

from lever_data.legacy.block import Decoded, Format, try_block
from lever_data.legacy.helper import Helper, State
from lever_data.legacy.layout import RefusedError
from lever_data.legacy.process import has_core
from lever_data.readers.json_blocks import Block

AHEAD = 4  # blocks in memory at once, beside the one in use
_AT_HELPER = 3  # one on its way there, one it decodes, one on its way back


class _Attempt:
    """Decoding one block: here, when asked, or there, at once."""

    def __init__(self, form: Format, text: bytes | None, remote: Future[Decoded] | None) -> None:
        self.remote = remote
        self._form = form
        self._text = text
        self._local: Future[Decoded] = Future()

    @property
    def is_waiting(self) -> bool:
        """Whether it is to be done here and is not done yet."""
        return self.remote is None and not self._local.done()

    def run(self) -> None:
        """Do it here."""
        try:
            self._local.set_result(try_block(self._form, self._text))
        except RefusedError as error:
            self._local.set_exception(error)
        self._text = None

    def __call__(self) -> Decoded:
        if self.is_waiting:
            self.run()
        return (self.remote or self._local).result()


def attempts(
    blocks: Iterator[Block], form: Format, helper_after: int | None
) -> Generator[tuple[Block, Callable[[], Decoded]]]:
    """Each block with a call that gives its batches or raises RefusedError.

    Args:
        blocks: the blocks of one file.
        form: the format; what it learns later serves later blocks.
        helper_after: start a second process after so many blocks; ``None``: never. Blocks are
            decoded here until it is ready.
    """
    window: deque[tuple[Block, _Attempt]] = deque()
    helper: Helper | None = None
    if helper_after is not None and not has_core():
        helper_after = None
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            if number == helper_after:
                helper = stack.enter_context(Helper())
            # What the first block shows of the file, all others must know.
            there = helper if number and helper is not None and helper.is_ready() else None
            window.append((block, _start(block, form, there, window)))
            if there is None or len(window) > AHEAD:
                yield _first(window)
        while window:
            yield _first(window)


def _start(
    block: Block, form: Format, helper: Helper | None, window: deque[tuple[Block, _Attempt]]
) -> _Attempt:
    text = block.as_object()
    busy = sum(1 for _, a in window if a.remote is not None and not a.remote.done())
    if helper is None or text is None or busy >= _AT_HELPER:
        return _Attempt(form, text, None)
    return _Attempt(form, None, helper.submit(text, State(type(form), form.known())))


def _first(window: deque[tuple[Block, _Attempt]]) -> tuple[Block, _Attempt]:
    """The next block; while the other process is still at it, later ones are decoded here."""
    block, attempt = window.popleft()
    while attempt.remote is not None and not attempt.remote.done():
        later = next((a for _, a in window if a.is_waiting), None)
        if later is None:
            break
        later.run()
    return block, attempt
