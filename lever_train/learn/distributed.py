"""Several processes as one: torchrun starts them, gradients and figures are summed.

In go the variables torchrun sets; out comes a :class:`World`. Every process streams the same
batches and takes every ``size``-th group of each, so a batch, and thereby the result, is that of
one process. Gradients are summed in one flat all-reduce. They
also stop together: Ctrl-C and SIGTERM ask, the loop answers when the state is whole.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from lever_train.inputs.devices import open_device

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def each(self, number: int) -> list[int]:
        """The number that every process gives, by rank."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        found: list[int] = self.sum(numbers).tolist()
        return found

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; a missing one counts as 0."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        distributed.all_reduce(flat)
        at = 0
        for p in trained:
            if p.grad is not None:
                p.grad.copy_(flat[at : at + p.numel()].view_as(p))
                at += p.numel()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()


def join(device: str) -> World:
    """Join the processes torchrun started; alone where it did not start this one.

    Raises:
        UsageError: the device is not there.
    """
    open_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a GPU for every process
    if not distributed.is_initialized():
        # counts are summed on the CPU, whatever the gradients are on
        on_gpu = device.startswith("cuda")
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return World(distributed.get_rank(), size)


def leave(world: World) -> None:
    """Undo :func:`join`."""
    if world.size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


class Interrupt:
    """While entered, the first signal is noted; a second one of Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # signal handlers belong to the main thread; elsewhere the caller stops the training
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, world: World) -> bool:
        """Whether any process was asked to stop; all of them stop at the same step."""
        if world.size == 1:
            return self.asked
        return bool(world.sum(torch.tensor([float(self.asked)]))[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
