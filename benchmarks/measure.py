"""Measure commands fairly: whole process trees, interleaved repeats, medians, ratios in one run.

In go commands that print one JSON object as their last line of output; out come :class:`Figure`
rows. ``seconds`` is what the command says its work took where it says so, else its wall time;
``peak`` is the largest resident memory of the command and all its children together.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_INTERVAL = 0.02  # seconds between two looks at the memory
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """One run of a command: seconds, peak bytes, and what it printed."""

    seconds: float
    peak: int
    said: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One measured case: medians over ``repeats`` runs.

    ``size`` is in ``unit``; ``ratio`` is how many times faster than ``against`` in the same run.
    """

    bench: str
    case: str
    size: float
    unit: str
    seconds: float
    peak_mb: float
    repeats: int
    against: str = ""
    ratio: float | None = None
    note: str = ""

    @property
    def rate(self) -> float:
        """Size per second."""
        return self.size / self.seconds

    def row(self) -> dict[str, Any]:
        """The figure for JSON."""
        return {**asdict(self), "rate": self.rate}


def run(words: Sequence[str | Path], *, watch: bool) -> Sample:
    """Run a command to its end; ``watch``: look at the memory of its process tree meanwhile.

    Watching slows what it watches (the kernel walks its page tables with a lock), hence apart.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr is shown.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(w) for w in words],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while watch and process.poll() is None:
        peak = max(peak, _tree_bytes(process.pid))
        time.sleep(_INTERVAL)
    process.wait()
    seconds = time.perf_counter() - started
    out = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(w) for w in words])
    lines = [line for line in out.splitlines() if line.startswith("{")]
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return Sample(said.get("seconds", seconds), max(peak, said.get("peak", 0)), said)


def interleave(cases: Mapping[str, Sequence[str | Path]], repeats: int) -> dict[str, Sample]:
    """Run every case ``repeats`` times, in turns, so that a busy moment hits all; medians.

    Before that every case runs once for its memory, which also warms the caches of files.
    """
    watched = {name: run(words, watch=True) for name, words in cases.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, words in cases.items():
            samples[name].append(run(words, watch=False))
    return {
        name: Sample(
            statistics.median(s.seconds for s in found),
            max(watched[name].peak, *(s.peak for s in found)),
            found[-1].said,
        )
        for name, found in samples.items()
    }


def python(module: str, *words: str | Path) -> list[str | Path]:
    """The words that run one of our modules."""
    return [sys.executable, "-m", module, *words]


def exponent(small: Figure, large: Figure) -> float:
    """How the cost grows: seconds ~ size ** exponent."""
    return math.log(large.seconds / small.seconds) / math.log(large.size / small.size)


def _tree_bytes(root: int) -> int:
    """Resident bytes of a process and its descendants, pages they share counted once each.

    The share of each process (Pss) where the kernel tells it, else its resident pages.
    """
    children: dict[int, list[int]] = {}
    for entry in (p.name for p in Path("/proc").iterdir()):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text("ascii", "replace")
            except OSError:
                continue  # it ended while we looked
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry))
    waiting, total = [root], 0
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        total += _resident(pid, shared=bool(children.get(root)))
    return total


def _resident(pid: int, *, shared: bool) -> int:
    try:
        if shared:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * _PAGE
    except OSError:
        return 0
