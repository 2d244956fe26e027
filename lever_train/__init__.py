"""Everything of lever with a tensor in it. Touches the store only through lever_data.

Importing it asks OpenMP to let waiting threads sleep, unless the environment says otherwise. It has
to be said before torch is loaded, hence here. On two cores shared with other work (load 8 to 11)
training ran at 90 to 114 queries/s with threads that spin at every operation and at 813 to 1,148
with threads that sleep.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lever_train.pack.packed import PackedSelector

__all__ = ["load"]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(folder: str | Path) -> PackedSelector:
    """What ``lever pack`` wrote, as a selector that a program asks: see ``pack/load.py``."""
    # here: torch is most of what a program that has not imported it waits for
    from lever_train.pack.load import load as load_pack

    return load_pack(folder)
