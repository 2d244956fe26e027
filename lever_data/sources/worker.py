"""The process at the other end of ``helper.py``: decodes the blocks it is sent."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys

from lever_data.sources import beam, rl  # noqa: F401 (of the first State; it would wait for them)
from lever_data.sources.block import Format, State, try_block
from lever_data.sources.channel import Channel
from lever_data.sources.layout import RefusedError
from lever_data.store.arrow_start import start_lean


def serve(channel: Channel) -> None:
    """Answer until the other side hangs up."""
    channel.send(True)  # ready
    form: Format | None = None
    last: State | None = None
    while True:
        try:
            state, text = channel.receive()
        except EOFError:
            return
        if form is None or state != last:
            form, last = state.form.restore(*state.known), state
        try:
            built, non_finite = try_block(form, text)
        except RefusedError:
            channel.send(None)
            continue
        channel.send((built.tokens, non_finite), memoryview(built.candidates.serialize()))
        channel.send(None, memoryview(built.queries.serialize()))  # it outlives the candidates


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches both; the other one decides
    start_lean()
    gc.disable()  # records have no cycles; looking for some costs a sixth of the decoding
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(Channel(socket.socket(fileno=int(sys.argv[1]))))
    os._exit(0)
