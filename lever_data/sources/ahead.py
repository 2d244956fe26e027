"""Decode a few blocks ahead, on this thread and in a second process where there is a core for it.

In go blocks in file order; out come, in the same order, the blocks and what came of decoding
each. Which process takes a block does not change the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import islice

from lever_data.readers.json_blocks import Block
from lever_data.sources.block import Decoded, Format, State, try_block
from lever_data.sources.helper import Helper
from lever_data.sources.layout import RefusedError
from lever_data.sources.process import has_core

AHEAD = 6  # blocks in memory at once, beside the one in use
_AT_HELPER = 3  # one it decodes, two that wait there while this thread is at one of its own


class _Attempt:
    """Decoding one block, here or in the other process, whichever comes to it first."""

    def __init__(self, form: Format, block: Block) -> None:
        self.block = block
        self._form = form
        self._result: Future[Decoded] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody has taken it yet."""
        return self._result is None

    @property
    def is_awaited(self) -> bool:
        """Whether the other process is still at it."""
        return self._result is not None and not self._result.done()

    def send(self, helper: Helper) -> None:
        """Have it done by the other process, where it can be."""
        parts = self.block.as_object()
        if parts is not None:
            self._result = helper.submit(parts, State(type(self._form), self._form.known()))

    def run(self) -> Future[Decoded]:
        """Do it here."""
        self._result = Future()
        parts = self.block.as_object()
        try:
            self._result.set_result(try_block(self._form, parts and b"".join(parts)))
        except RefusedError as error:
            self._result.set_exception(error)
        return self._result

    def __call__(self) -> Decoded:
        return (self._result or self.run()).result()


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
    window: deque[_Attempt] = deque()
    helper: Helper | None = None
    if helper_after is not None and not has_core():
        helper_after = None
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            if number == helper_after:
                helper = stack.enter_context(Helper())
            window.append(_Attempt(form, block))
            # What the first block shows of the file, all others must know.
            there = helper if number and helper is not None and helper.is_ready() else None
            if there is not None:
                _keep_busy(there, window)
            if there is None or len(window) > AHEAD:
                yield _first(window, there)
        while window:
            yield _first(window, helper)


def _keep_busy(helper: Helper, window: deque[_Attempt]) -> None:
    """Give the other process the next free blocks, so that it never waits for one."""
    free = (attempt for attempt in window if attempt.is_free)
    for attempt in islice(free, max(0, _AT_HELPER - helper.load)):
        attempt.send(helper)


def _first(window: deque[_Attempt], helper: Helper | None) -> tuple[Block, _Attempt]:
    """The next block; while the other process is still at it, later ones are decoded here."""
    first = window.popleft()
    while helper is not None and first.is_awaited:
        later = next((attempt for attempt in window if attempt.is_free), None)
        if later is None:
            break
        later.run()
        _keep_busy(helper, window)
    return first.block, first
