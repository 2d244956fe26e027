"""Several processes as one: torchrun starts them, gradients and figures are summed.

In go the variables torchrun sets; out comes a :class:`World`. Every process streams the same
batches and takes every ``size``-th group of each, so a batch, and thereby the result, is that of
one process. Gradients are summed in one flat all-reduce.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from lever_train.inputs.devices import open_device


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
