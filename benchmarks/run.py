"""Every benchmark in one run: a Markdown table and JSON.

    python -m benchmarks.run [--long] [--only ingest stream audit parts] [--out DIR] [--repeats 3]

``make bench`` runs the sizes of a pause (200 MB of JSON, 10 million candidates), ``make
bench-long`` adds 2 GB and 100 million. Each case is a process of its own, cases take turns, what
is shown are medians; peak memory is that of the whole process tree. A contender whose package is
not installed (the extra ``bench``) is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import generate, synthetic
from benchmarks.measure import Figure, Sample, exponent, interleave, python

MEGABYTE = 1_000_000
NEEDS = {"orjson + pyarrow": "orjson", "datasets": "datasets"}
PARTS = {  # benches that print figures of their own
    "training": ["benchmarks.train", "a", "b"],
    "proposals": ["benchmarks.proposals", "--queries", "1000", "--cache-rows", "200000"],
    "metric": ["benchmarks.metric"],
}


@dataclass(frozen=True)
class Plan:
    """What to run: where to work, sizes beyond the short ones or not, how often."""

    work: Path
    long: bool
    repeats: int
    say: Callable[[str], None]


def ingest(plan: Plan) -> Iterator[Figure]:
    """JSON of 20 (for the growth), 200 and 2,000 MB → Parquet, against the peers."""
    for megabytes in (20, 200, 2_000) if plan.long else (20, 200):
        source = _rl_data(plan, megabytes)
        size = source.stat().st_size / MEGABYTE
        store, out = plan.work / "ingested", plan.work / "peer.parquet"
        words = f'rm -rf "{store}" && exec "$0" "$@"'
        lever = python("lever_cli", "ingest", source, "--store", store, "--dataset", "d")
        cases = {"lever ingest": ["sh", "-c", words, *lever, "--split", "train"]}
        if megabytes > 20:
            cases |= {
                n: python("benchmarks.peers", n, source, out) for n in _peers(plan, megabytes)
            }
        found = interleave(cases, plan.repeats if megabytes < 1_000 else 1)
        yield from _figures("ingest", size, "MB", found, plan.repeats)


def _peers(plan: Plan, megabytes: int) -> list[str]:
    """Those that hold the parsed file many times over sit out the large one."""
    slow = {"polars", "json + pyarrow", "orjson + pyarrow"} if megabytes > 200 else set()
    names = ["duckdb", "json + pyarrow", "orjson + pyarrow", "polars"]
    return [n for n in names if n not in slow and _there(plan, n)]


def stream(plan: Plan) -> Iterator[Figure]:
    """View → tensors, against a loop over the JSON, Hugging Face datasets and polars."""
    for megabytes in (20, 200, 2_000) if plan.long else (20, 200):
        source = _rl_data(plan, megabytes)
        store = _ingested(plan, source)
        names = ["lever"] if megabytes == 20 else ["lever", "polars", "datasets", "json loop"]
        if megabytes == 2_000:
            names = ["lever", "polars"]
        found = interleave(
            {n: python("benchmarks.stream", n, store, source) for n in names if _there(plan, n)},
            plan.repeats,
        )
        said = {(s.said["candidates"], round(s.said["reward"])) for s in found.values()}
        assert len(said) == 1, f"the contenders disagree: {said}"
        candidates = next(iter(said))[0]
        yield from _figures("view to tensors", candidates, "candidates", found, plan.repeats)


def audit(plan: Plan) -> Iterator[Figure]:
    """Audit, a count and a group-by over 1, 10 and 100 million candidates."""
    count = "select count(*) from all_candidates"
    group = "select gen_method, avg(vqa_acc_score) from all_candidates group by 1"
    for millions in (1, 10, 100) if plan.long else (1, 10):
        store = plan.work / f"audit-{millions}"
        plan.say(f"making {millions} million candidates")
        run = synthetic.make_store(store, millions * 1_000_000 // synthetic.PER_QUERY)
        where = ("--store", store, "--memory", "4")
        cases = {
            "lever audit": python("lever_cli", "audit", "--store", store, "--json", store / "a"),
            "lever query, count": python("lever_cli", "query", count, *where),
            "lever query, mean by source": python("lever_cli", "query", group, *where),
        }
        found = interleave(cases, plan.repeats if millions < 100 else 1)
        for name, sample in found.items():
            yield _figure(name, run.num_rows, "candidates", "lever audit", sample, plan.repeats)
        shutil.rmtree(store)


BENCHES: dict[str, Callable[[Plan], Iterator[Figure]]] = {
    "ingest": ingest,
    "stream": stream,
    "audit": audit,
}


def parts(plan: Plan) -> dict[str, dict[str, float]]:
    """The benches that are programs of their own, and what they print."""
    found: dict[str, dict[str, float]] = {}
    for name, (module, *words) in PARTS.items():
        plan.say(name)
        out = plan.work / f"{name}.json"
        subprocess.run([*map(str, python(module, *words)), "--json", str(out)], check=True)
        found[name] = json.loads(out.read_text())
    return found


def _figures(
    bench: str, size: float, unit: str, found: dict[str, Sample], repeats: int
) -> Iterator[Figure]:
    """One figure a case; the first is ours, and the others' ratios say how much faster it is."""
    ours = next(iter(found.values()))
    for name, sample in found.items():
        figure = _figure(name, size, unit, bench, sample, repeats)
        if sample is not ours:
            ratio = sample.seconds / ours.seconds
            figure = Figure(**{**vars(figure), "against": name, "ratio": ratio})
        yield figure


def _figure(case: str, size: float, unit: str, bench: str, sample: Sample, repeats: int) -> Figure:
    return Figure(bench, case, size, unit, sample.seconds, sample.peak / MEGABYTE, repeats)


def _rl_data(plan: Plan, megabytes: int) -> Path:
    path = plan.work / f"rl_{megabytes}.json"
    if not path.exists():
        plan.say(f"making {megabytes} MB of RL data")
        generate.write(path, megabytes * MEGABYTE)
    return path


def _ingested(plan: Plan, source: Path) -> Path:
    store = plan.work / f"store-{source.stem}"
    if not store.exists():
        words = python("lever_cli", "ingest", source, "--store", store, "--dataset", "d")
        subprocess.run([*map(str, words), "--split", "train"], check=True, capture_output=True)
    return store


def _there(plan: Plan, contender: str) -> bool:
    package = NEEDS.get(contender)
    there = package is None or find_spec(package) is not None
    if not there:
        plan.say(f"{contender} is left out: {package} is not installed (pip install '.[bench]')")
    return there


def markdown(figures: list[Figure], others: dict[str, dict[str, float]]) -> str:
    """The tables."""
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        "medians, peak memory of the whole process tree.",
        "",
        "| bench | case | size | seconds | rate/s | peak MB | lever is faster |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for f in figures:
        ratio = "" if f.ratio is None else f"{f.ratio:.1f} ×"
        size = f"{f.size:,.0f} {f.unit}"
        lines.append(
            f"| {f.bench} | {f.case} | {size} | {f.seconds:.2f} | {f.rate:,.0f} "
            f"| {f.peak_mb:,.0f} | {ratio} |"
        )
    lines += ["", "| growth | from | to | seconds ~ size^ |", "|---|---:|---:|---:|"]
    for small, large in growth(figures):
        lines.append(
            f"| {small.bench}: {small.case} | {small.size:,.0f} | {large.size:,.0f} {small.unit} "
            f"| {exponent(small, large):.2f} |"
        )
    for values in others.values():
        lines += ["", "| figure | value |", "|---|---:|"]
        lines += [f"| {name} | {value:,.1f} |" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def growth(figures: list[Figure]) -> Iterator[tuple[Figure, Figure]]:
    """Neighbouring sizes of one case."""
    by_case: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        by_case.setdefault((figure.bench, figure.case), []).append(figure)
    for found in by_case.values():
        found.sort(key=lambda f: f.size)
        yield from pairwise(found)


def _say(text: str) -> None:
    print(f"… {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*BENCHES, "parts"])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    wanted = given.only or [*BENCHES, "parts"]
    with tempfile.TemporaryDirectory() as work:
        plan = Plan(Path(work), given.long, given.repeats, _say)
        figures = [f for name in BENCHES if name in wanted for f in BENCHES[name](plan)]
        others = parts(plan) if "parts" in wanted else {}
    given.out.mkdir(parents=True, exist_ok=True)
    name = "bench-long" if given.long else "bench"
    rows: dict[str, Any] = {"figures": [f.row() for f in figures], "parts": others}
    (given.out / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = markdown(figures, others)
    (given.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
