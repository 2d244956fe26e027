"""A chat endpoint on loopback for tests: a real HTTP server into which faults are injected."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler", str, int], bool]  # question, attempt → whether it answered


@dataclass
class Endpoint:
    """A chat endpoint that answers with the last word of the last text it is shown."""

    fault: Fault | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    active: int = 0
    most_active: int = 0
    delay: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        question = "a probe - -" if isinstance(content, str) else content[-1]["text"]
        here = self.endpoint
        with here.lock:
            here.seen.append(body)
            here.headers.append(self.headers.get("Authorization"))
            here.tries[question] += 1
            here.times.setdefault(question, []).append(time.monotonic())
            here.active += 1
            here.most_active = max(here.most_active, here.active)
            attempt = here.tries[question]
        try:
            time.sleep(here.delay)
            if here.fault is None or not here.fault(self, question, attempt):
                self.answer(f"echo {question.split()[-3]}\n")
        finally:
            with here.lock:
                here.active -= 1

    def answer(self, text: str) -> None:
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        choices = [{"message": {"role": "assistant", "content": text}}]
        self.send(200, json.dumps({"choices": choices, "usage": usage}), "application/json")

    def send(self, status: int, text: str, kind: str = "text/plain", **headers: str) -> bool:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Endpoint]:
    """The endpoint on a free port of loopback."""
    found = Endpoint()
    handler = type("Handler", (Handler,), {"endpoint": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        yield found
        server.shutdown()
        thread.join()
