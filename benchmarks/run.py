"""Every benchmark in one run: a Markdown table and JSON.

    python -m benchmarks.run [--long] [--only ingest stores …] [--out DIR] [--repeats 3]

``make bench`` runs the sizes of a pause (200 MB of JSON, 10 million candidates), ``make
bench-long`` adds 2 GB, 100 million and a billion. Each case is a process of its own, cases take
turns, what is shown are medians; peak memory is that of the whole process tree. Data too is made by
processes of their own: the peak of a process begins with what its parent held. Every figure is a
side of a ratio: a peer's time over ours, or a second size's over the first's. A contender whose
package is not installed (the extra ``bench``) is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks import PER_QUERY, stores
from benchmarks.measure import (
    MEGABYTE,
    Figure,
    Plan,
    call,
    exponents,
    figures_of,
    interleave,
    python,
)
from benchmarks.stores import QUERIES

NEEDS = {"bucket": "moto", "orjson + pyarrow": "orjson", "datasets": "datasets"}
RESIDENT = {"duckdb": 5, "json + pyarrow": 5, "orjson + pyarrow": 6, "polars": 13}  # times the file
_OWN_CACHE = 'LEVER_CACHE="$0/$$" exec "$@"'


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
        yield from figures_of("ingest", size, "MB", interleave(cases, plan.repeats), plan.repeats)


def _peers(plan: Plan, megabytes: int) -> list[str]:
    names = ["duckdb", "json + pyarrow", "orjson + pyarrow", "polars"]
    needed = {n: int(megabytes * RESIDENT[n]) for n in names}
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEGABYTE
    for name, need in needed.items():
        if need > there:
            plan.say(f"{name} is left out: it would need {need:,} MB of memory")
    return [n for n in names if needed[n] <= there and _there(plan, n)]


def stream(plan: Plan) -> Iterator[Figure]:
    """View → tensors, against a loop over the JSON, Hugging Face datasets and polars."""
    for megabytes in (10, 100, 2_000) if plan.long else (10, 100):
        source = _rl_data(plan, megabytes)
        store = _ingested(plan, source)
        names = ["lever"] if megabytes == 10 else ["lever", "polars", "datasets", "json loop"]
        if megabytes == 2_000:
            names = ["lever", "polars"]
        found = interleave(
            {n: python("benchmarks.stream", n, store, source) for n in names if _there(plan, n)},
            plan.repeats,
        )
        said = {(s.said["candidates"], round(s.said["reward"])) for s in found.values()}
        assert len(said) == 1, f"the contenders disagree: {said}"
        candidates = next(iter(said))[0]
        yield from figures_of("view to tensors", candidates, "candidates", found, plan.repeats)


def _program(plan: Plan, module: str, *words: str) -> Iterator[Figure]:
    """The figures of a bench that is a program of its own."""
    plan.say(" ".join((module, *words)))
    out = plan.work / "figures.json"
    call(python(module, *words, "--json", out))
    for row in json.loads(out.read_text()):
        del row["rate"]
        yield Figure(**row)


def training(plan: Plan) -> Iterator[Figure]:
    """Training against the legacy loop; the memory of an epoch over 20 million candidates."""
    yield from _program(plan, "benchmarks.train", "a", "b", *(["d"] if plan.long else []))


def features(plan: Plan) -> Iterator[Figure]:
    """Features of pairs, and a whole training of the selector that reads them."""
    yield from _program(plan, "benchmarks.features")


def proposals(plan: Plan) -> Iterator[Figure]:
    """Proposals, answers and the cache of answers."""
    yield from _program(plan, "benchmarks.proposals", "--cache-rows", "100000")


def endpoint(plan: Plan) -> Iterator[Figure]:
    """Answers from an endpoint, beside a plain loop."""
    yield from _program(plan, "benchmarks.endpoint", "--answers", "4000" if plan.long else "1000")


def metric(plan: Plan) -> Iterator[Figure]:
    """Predictions scored."""
    yield from _program(plan, "benchmarks.metric")


def pack(plan: Plan) -> Iterator[Figure]:
    """Picks of packed selectors, one by one and many at once; the start of a program with one."""
    starts = {
        "from lever_train import load": "from lever_train import load",
        "what its first call imports": "import lever_train.pack.load",
        "torch alone": "import lever_train, torch",
    }
    cases = {name: [sys.executable, "-c", words] for name, words in starts.items()}
    yield from figures_of("pack", 1, "start", interleave(cases, plan.repeats), plan.repeats)
    yield from _program(plan, "benchmarks.pack")
    if plan.long:
        yield from _program(plan, "benchmarks.pack", "--examples", "1000000", "--cells")


def board(plan: Plan) -> Iterator[Figure]:
    """Pages of `lever board` over small stores, in seconds, and the start of the command."""
    help_of = {f"lever {n} --help": python("lever_cli", n, "--help") for n in ("board", "query")}
    yield from figures_of("start", 1, "command", interleave(help_of, plan.repeats), plan.repeats)
    for candidates in (20_000, 200_000):
        yield from _pages(plan, candidates)


def bucket(plan: Plan) -> Iterator[Figure]:
    """A store in a bucket (moto's S3 server on loopback) beside the same in a folder: ingest, a
    count with the files in the cache, and the first batch of a training with nothing there."""
    if not _there(plan, "bucket"):
        return
    from tests.cloud import Cloud, environment, new_bucket

    source, vectors = _rl_data(plan, 20), plan.work / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).normal(size=(10_000, 8)).astype(np.float32))
    size = source.stat().st_size / MEGABYTE
    named = ["--dataset", "d", "--split", "train"]
    cache = {"LEVER_CACHE": str(plan.work / "cache")}
    with Cloud() as cloud, patch.dict(os.environ, environment(cloud) | cache):
        place = f"s3://{new_bucket(cloud).name}"
        places = {"bucket": f"{place}/store", "folder": str(plan.work / "kept")}
        for store in places.values():
            call(python("lever_cli", "ingest", source, "--store", store, *named))
        fresh = ["sh", "-c", 'exec "$@" --store "$0/$$"']  # a store of its own for every process
        ingests = {
            name: [*fresh, root, *python("lever_cli", "ingest", source, *named)]
            for name, root in (("bucket", place), ("folder", str(plan.work / "fresh")))
        }
        count = {
            name: python("lever_cli", "query", QUERIES["count"], "--store", store)
            for name, store in places.items()
        }
        empty = ["sh", "-c", _OWN_CACHE, str(plan.work / "empty")]
        first = {
            name: [*empty, *python("benchmarks.first_batch", store, vectors)]
            for name, store in places.items()
        }
        for case, words in (("ingest", ingests), ("count", count), ("first batch", first)):
            found = {f"{case}, {name}": w for name, w in words.items()}
            yield from figures_of(
                "bucket", size, "MB", interleave(found, plan.repeats), plan.repeats
            )


def board_millions(plan: Plan) -> Iterator[Figure]:
    """The same pages over 1 and 10 million candidates."""
    for millions in (1, 10):
        yield from _pages(plan, millions * 1_000_000)


def _pages(plan: Plan, candidates: int) -> Iterator[Figure]:
    """Each page of the board over so many candidates, and the memory of its server."""
    store = plan.work / f"board-{candidates}"
    plan.say(f"making {candidates:,} candidates")
    queries = candidates // PER_QUERY
    call(python("benchmarks.synthetic", store, str(queries)))
    words = [str(w) for w in python("benchmarks.board", store)]
    found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    peak = found.pop("peak_mb")
    for case, seconds in found.items():
        note = "goal 2 s and 400 MB" if case == "cold" else "goal 0.5 s"
        size = queries * PER_QUERY
        yield Figure("board", case, size, "candidates", seconds, 1, peak, note=note)
    shutil.rmtree(store)


BENCHES: dict[str, Callable[[Plan], Iterator[Figure]]] = {
    "ingest": ingest,
    "stream": stream,
    "stores": stores.figures,
    "training": training,
    "features": features,
    "proposals": proposals,
    "endpoint": endpoint,
    "metric": metric,
    "pack": pack,
    "board": board,
    "board-millions": board_millions,
    "bucket": bucket,
}


def _rl_data(plan: Plan, megabytes: int) -> Path:
    path = plan.work / f"rl_{megabytes}.json"
    if not path.exists():
        plan.say(f"making {megabytes} MB of RL data")
        call(python("benchmarks.generate", path, "--megabytes", str(megabytes)))
    return path


def _ingested(plan: Plan, source: Path) -> Path:
    store = plan.work / f"store-{source.stem}"
    if not store.exists():
        words = ("ingest", source, "--store", store, "--dataset", "d", "--split", "train")
        call(python("lever_cli", *words))
    return store


def _there(plan: Plan, contender: str) -> bool:
    package = NEEDS.get(contender)
    there = package is None or find_spec(package) is not None
    if not there:
        plan.say(f"{contender} is left out: {package} is not installed (pip install '.[bench]')")
    return there


def markdown(figures: list[Figure]) -> str:
    """The table, and how each case grows."""
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        "medians, peak memory of the whole process tree.",
        "",
        "| bench | case | size | seconds | processor s | rate/s | peak MB | lever is faster | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for f in figures:
        ratio = "" if f.ratio is None else f"{_short(f.ratio)} ×"
        peak = "" if f.peak_mb is None else f"{f.peak_mb:,.0f}"
        size = f"{f.size:,.0f} {f.unit}"
        lines.append(
            f"| {f.bench} | {f.case} | {size} | {f.seconds:.2f} | {_known(f.cpu)} "
            f"| {_short(f.rate)} | {peak} | {ratio} | {f.note} |"
        )
    lines += ["", "| growth | from | to | seconds ~ size^ | processor s ~ size^ |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for small, large in growth(figures):
        by_clock, by_cpu = exponents(small, large)
        lines.append(
            f"| {small.bench}: {small.case} | {small.size:,.0f} | {large.size:,.0f} {small.unit} "
            f"| {by_clock:.2f} | {_known(by_cpu)} |"
        )
    return "\n".join(lines) + "\n"


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def growth(figures: list[Figure]) -> Iterator[tuple[Figure, Figure]]:
    """Neighbouring sizes of one case."""
    by_case: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        by_case.setdefault((figure.bench, figure.case), []).append(figure)
    for found in by_case.values():
        found.sort(key=lambda f: f.size)
        yield from pairwise(found)


def alone(figures: list[Figure]) -> list[Figure]:
    """Figures that are no side of a ratio: with no peer beside them, and at no second size."""
    sides = {id(f) for pair in growth(figures) for f in pair}
    for ours, other in pairwise(figures):
        if other.ratio is not None:
            sides |= {id(ours), id(other)}
    return [f for f in figures if id(f) not in sides]


def _say(text: str) -> None:
    print(f"… {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", nargs="*", choices=BENCHES)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    wanted = given.only or BENCHES
    with tempfile.TemporaryDirectory() as work:
        plan = Plan(Path(work), given.long, given.repeats, _say)
        figures = []
        for figure in (f for name in BENCHES if name in wanted for f in BENCHES[name](plan)):
            _say(f"{figure.bench}: {figure.case}, {figure.seconds:.2f} s")
            figures.append(figure)
    given.out.mkdir(parents=True, exist_ok=True)
    name = "bench-long" if given.long else "bench"
    rows = json.dumps([f.row() for f in figures], indent=2)
    (given.out / f"{name}.json").write_text(rows + "\n")
    text = markdown(figures)
    (given.out / f"{name}.md").write_text(text)
    print(text)
    assert not alone(figures), f"compared with nothing: {alone(figures)}"


if __name__ == "__main__":
    main()
