"""Where work is done that can be cut into parts: here, or by workers on a Ray cluster."""

from __future__ import annotations

from typing import Literal

from lever_data.options import Section, option


class Engine(Section):
    """Who does the work. The parts and their bytes are the same."""

    engine: Literal["local", "ray"] = option("local", "Who does the work.")
    workers: int = option(2, "Workers of ray.", metavar="N", ge=1)
    gpus_per_worker: float = option(0.0, "GPUs that ray reserves for each.", metavar="N", ge=0)
