"""Answers from an endpoint: how many a second, beside a plain asyncio loop of as many requests.

    python -m benchmarks.endpoint [--answers 4000] [--concurrency 16] [--json FILE]

The endpoint is a stub in a process of its own that waits 50 ms, or in the case "1 in 64 slow" 3 s
for one request in 64. Ours goes the way of a rollout: talks of 256 prompts, answers into the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx

from benchmarks.measure import Figure, against, print_figures
from lever_data.items.prompts import Item, Prompt
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.openai import OpenAIAnswerer
from lever_train.rollout.ask import Asker, Talk, scope
from lever_train.rollout.cache import open_cache

FAST, SLOW, ONE_IN, TALK, TURNS = 0.05, 3.0, 64, 256, 3
_BODY = b'{"choices": [{"message": {"content": "a cat"}, "finish_reason": "stop"}]}'
_REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=4000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=["even", "heavy"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(heavy=options.serve == "heavy"))
    else:
        print_figures(list(rates(options.answers, options.concurrency)), options.json)


def rates(answers: int, concurrency: int) -> Iterator[Figure]:
    """Both ways, with even latency and with a heavy tail."""
    for kind in ("even", "heavy"):
        plain, ours = [], []
        with _stub(kind) as url:
            for _ in range(TURNS):  # by turns: what else the machine does falls on both
                plain.append(asyncio.run(_plain(url, answers, concurrency)))
                ours.append(_ours(url, answers, concurrency))
        name = f"endpoint, {'50 ms' if kind == 'even' else '1 in 64 slow'}"
        yield from against(
            Figure(name, "lever", answers, "answers", median(ours), TURNS),
            [
                Figure(
                    name, "plain loop", answers, "answers", median(plain), TURNS, note="goal 0.95"
                )
            ],
        )


def _ours(url: str, answers: int, concurrency: int) -> float:
    item = Item("d", "s", 0, "what?", ("a",), "a")
    prompts = [
        Prompt(Item("d", "s", n, f"what is {n}?", ("a",), "a"), (item,)) for n in range(answers)
    ]

    def talk(first: int) -> Talk[int]:
        return len((yield prompts[first : first + TALK]))

    answerer = OpenAIAnswerer.connect(url, AnswererSpec(model="m", concurrency=concurrency))
    with tempfile.TemporaryDirectory() as folder:
        asker = Asker(answerer, open_cache(Path(folder), scope(answerer)))
        began = time.perf_counter()
        done = sum(asker.serve(talk(n) for n in range(0, answers, TALK)))
    assert done == answers
    return time.perf_counter() - began


async def _plain(url: str, answers: int, concurrency: int) -> float:
    numbers = iter(range(answers))
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:

        async def worker() -> None:
            for number in numbers:
                message = {"role": "user", "content": f"what is {number}?"}
                body = {"model": "m", "messages": [message]}
                (await client.post(f"{url}/chat/completions", json=body)).json()

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - began


async def _serve(*, heavy: bool) -> None:
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while head := await reader.read(1 << 16):
            while b"\r\n\r\n" not in head:
                head += await reader.read(1 << 16)
            front, _, body = head.partition(b"\r\n\r\n")
            size = int(front.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            while len(body) < size:
                body += await reader.read(1 << 16)
            count += 1
            await asyncio.sleep(SLOW if heavy and count % ONE_IN == 0 else FAST)
            writer.write(_REPLY % (len(_BODY), _BODY))

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def _stub(kind: str) -> Iterator[str]:
    words = [sys.executable, "-m", "benchmarks.endpoint", "--serve", kind]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


if __name__ == "__main__":
    main()
