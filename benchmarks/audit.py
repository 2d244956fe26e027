"""Time and memory of a whole audit: ``python -m benchmarks.audit [STORE] [RUNS]``.

Makes a synthetic store of 10 million candidates where STORE holds none, then audits it in fresh
processes that remember none. Aim on two quiet cores: 6 s and 4 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.synthetic import make_store

QUERIES = 666_667
SECONDS, GIGABYTES = 6.0, 4.0
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from lever_data.report.audit import audit
from lever_data.report.options import AuditRequest
from lever_data.report.audit_page import audit_page
from lever_data.store.store import Store
start = time.perf_counter()
found = audit(Store.open(Path(sys.argv[1])), AuditRequest())
audit_page([found])
print(json.dumps({
    "candidates": found.figures["candidates"],
    "seconds": round(time.perf_counter() - start, 2),
    "cpu_seconds": round(time.process_time(), 2),
    "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
}))
"""


def measure(store: Path) -> dict[str, float]:
    """One audit with its page, in a process of its own."""
    words = [sys.executable, "-c", _CHILD, str(store)]
    with tempfile.TemporaryDirectory() as cache:
        own = os.environ | {"LEVER_CACHE": cache}
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=own)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(given[0]) if given else Path(scratch) / "store"
        if not (store / "lever.json").exists():
            print(make_store(store, QUERIES).run)
        measured = [measure(store) for _ in range(int(given[1]) if len(given) > 1 else 3)]
    for row in measured:
        print(json.dumps(row))
    best = min(measured, key=lambda row: row["seconds"])
    within = best["seconds"] < SECONDS and best["gigabytes"] < GIGABYTES
    print(f"{'within' if within else 'OVER'} {SECONDS:g} s and {GIGABYTES:g} GB")


if __name__ == "__main__":
    main()
