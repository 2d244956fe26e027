"""How quick `lever board` is over a store: its first page, other pages asked again, its memory.

    python -m benchmarks.board STORE

In goes a store of :mod:`benchmarks.synthetic`; out comes a JSON object: seconds by page, ``cold``
from the start of the process to the first page, and ``peak_mb`` of the server, whose audits run in
processes of their own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.measure import python

PAGES = {  # case → address; each is asked twice, and the second answer is what counts
    "store": "store",
    "view": "view",
    "view, filtered": "view?where=gen_method:eq:beam&where=query_id:ge:1000",
    "view, page 100": "view?page=100",
    "queries": "queries",
    "queries, all wrong": "queries?filter=all_wrong&sort=best",
    "query": "query?dataset=synthetic&split=train&id=123",
    "audit": "audit",
    "demonstrations": "demonstrations",
}
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def measure(store: Path) -> dict[str, float]:
    """Seconds by page, and the server's largest resident memory in MB."""
    words = [str(w) for w in python("lever_cli", "board", "--no-browser", "--store", store)]
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            base = process.stdout.readline().strip().rpartition("/")[0]
            _ask(f"{base}/store")
            found = {"cold": time.perf_counter() - started}
            for case, address in PAGES.items():
                while _ask(f"{base}/{address}") == 202:  # its audit is being made
                    pass
                begun = time.perf_counter()
                _ask(f"{base}/{address}")
                found[case] = time.perf_counter() - begun
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            assert peak is not None
            return found | {"peak_mb": int(peak[1]) / 1000}
        finally:
            process.terminate()


def _ask(address: str) -> int:
    with _DIRECT.open(address) as answer:
        answer.read()
        return int(answer.status)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
