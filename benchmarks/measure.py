"""Measure fairly: interleaved repeats, medians, ratios in one run.

In go commands (:func:`interleave`: whole process trees and their memory) or calls
(:func:`in_turns`); out come :class:`Figure` rows. A command may print one JSON object as its last
line: ``seconds`` is what it says its work took where it says so, else its wall time; ``peak`` is
the largest resident memory of the command and all its children together.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000
_INTERVAL = 0.02  # seconds between two looks at the memory
_PAGE = os.sysconf("SC_PAGE_SIZE")

Work = tuple[str, float, Callable[[], object]]


@dataclass(frozen=True)
class Sample:
    """One run of a command: seconds, those of the processor (its children's too), peak bytes, and
    what it printed."""

    seconds: float
    cpu: float
    peak: int
    said: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One measured case: medians over ``repeats`` runs.

    ``size`` is in ``unit``; ``ratio``: lever did so many times the work of this case a second, in
    the same run; ``peak_mb`` is none for a call inside a process, as is ``cpu``, the seconds of the
    processor that a process took, with its start.
    """

    bench: str
    case: str
    size: float
    unit: str
    seconds: float
    repeats: int
    peak_mb: float | None = None
    cpu: float | None = None
    ratio: float | None = None
    note: str = ""

    @property
    def rate(self) -> float:
        """Size per second."""
        return self.size / self.seconds

    def row(self) -> dict[str, Any]:
        """The figure for JSON."""
        return {**asdict(self), "rate": self.rate}


@dataclass(frozen=True)
class Plan:
    """What to run: where to work, sizes beyond the short ones or not, how often."""

    work: Path
    long: bool
    repeats: int
    say: Callable[[str], None]


def run(words: Sequence[str | Path], *, watch: bool) -> Sample:
    """Run a command to its end; its memory is that of its largest process.

    Args:
        watch: look at the memory of its process tree meanwhile. It slows what it watches (the
            kernel walks its page tables with a lock), hence apart from what is timed.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr is shown.
    """
    plain, peak = [str(w) for w in words], 0
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(plain, stdout=out)
        pid, status = 0, 0
        while not pid:
            if watch:
                peak = max(peak, _tree_bytes(process.pid))
                time.sleep(_INTERVAL)
            pid, status, used = os.wait4(process.pid, os.WNOHANG if watch else 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if not watch:
            peak = used.ru_maxrss * 1024
        seconds = time.perf_counter() - started
        out.seek(0)
        lines = [line for line in out if line.startswith("{")]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, plain)
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    cpu = used.ru_utime + used.ru_stime
    return Sample(said.get("seconds", seconds), cpu, max(peak, said.get("peak", 0)), said)


def interleave(
    cases: Mapping[str, Sequence[str | Path]], repeats: int, *, watch: bool = True
) -> dict[str, Sample]:
    """Run every case ``repeats`` times, in turns, so that a busy moment hits all; medians.

    Args:
        watch: before that the first, ours, runs once for the memory of all its processes; the
            others have one.
    """
    first = next(iter(cases))
    watched = run(cases[first], watch=True) if watch else Sample(0.0, 0.0, 0, {})
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, words in cases.items():
            samples[name].append(run(words, watch=False))
    return {
        name: Sample(
            statistics.median(s.seconds for s in found),
            statistics.median(s.cpu for s in found),
            max(watched.peak if name == first else 0, *(s.peak for s in found)),
            found[-1].said,
        )
        for name, found in samples.items()
    }


def figures_of(
    bench: str, size: float, unit: str, found: dict[str, Sample], repeats: int
) -> Iterator[Figure]:
    """One figure a case; the first is ours."""
    ours, *others = (
        Figure(bench, name, size, unit, s.seconds, repeats, s.peak / MEGABYTE, s.cpu)
        for name, s in found.items()
    )
    return against(ours, others)


def call(words: Sequence[str | Path]) -> None:
    """Run what is not measured; what it prints is of no use unless it fails."""
    subprocess.run([str(w) for w in words], check=True, stdout=subprocess.DEVNULL)


def in_turns(bench: str, unit: str, work: Sequence[Work], repeats: int = 3) -> list[Figure]:
    """Call everything ``repeats`` times, in turns, after a turn that warms up; medians, in order.

    Args:
        work: per case its name, how many units it does, and the call that does them.
    """
    seconds: list[list[float]] = [[] for _ in work]
    for repeat in range(repeats + 1):
        for (_, _, call), taken in zip(work, seconds, strict=True):
            started = time.perf_counter()
            call()
            if repeat:
                taken.append(time.perf_counter() - started)
    return [
        Figure(bench, case, size, unit, statistics.median(taken), repeats)
        for (case, size, _), taken in zip(work, seconds, strict=True)
    ]


def against(ours: Figure, others: Iterable[Figure]) -> Iterator[Figure]:
    """Ours, then the others with how many times faster it is."""
    yield ours
    for figure in others:
        yield replace(figure, ratio=ours.rate / figure.rate)


def print_figures(figures: Iterable[Figure], out: Path | None) -> None:
    """Print a table; write JSON to ``out``."""
    found = list(figures)
    for f in found:
        ratio = "" if f.ratio is None else f"{f.ratio:,.2f} x"
        peak = "" if f.peak_mb is None else f"{f.peak_mb:,.0f} MB"
        print(f"{f.case:44s} {f.rate:14,.1f} {f.unit}/s {ratio:>12s} {peak:>9s} {f.note}")
    if out is not None:
        out.write_text(json.dumps([f.row() for f in found]))


def python(module: str, *words: str | Path) -> list[str | Path]:
    """The words that run one of our modules."""
    return [sys.executable, "-m", module, *words]


def exponents(small: Figure, large: Figure) -> tuple[float, float | None]:
    """How the cost grows: seconds ~ size ** exponent, and the same of those of the processor, which
    are less disturbed by what else runs."""
    step = math.log(large.size / small.size)
    of_cpu = None
    if small.cpu and large.cpu:
        of_cpu = math.log(large.cpu / small.cpu) / step
    return math.log(large.seconds / small.seconds) / step, of_cpu


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
