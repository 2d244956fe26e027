"""The device a command computes on, checked before anything is read."""

from __future__ import annotations

import torch

from lever_data.errors import UsageError


def open_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        UsageError: no such device, or this machine or this build of torch lacks it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError("there is no such device", value=name, hint="cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"torch sees {count} CUDA device{'' if count == 1 else 's'} here",
            value=name,
            hint="--device cpu" if count == 0 else f"cuda:0 to cuda:{count - 1}, or --device cpu",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("torch has no mps here", value=name, hint="--device cpu")
    return device
