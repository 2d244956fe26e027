"""A chat endpoint on loopback for tests: a real HTTP server into which faults are injected."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lever_data.items.prompts import Item, Prompt
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.openai import OpenAIAnswerer

EXPECTED = [f"echo {n}\n" for n in range(40)]  # what it answers to `prompts`
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
        question = _question(body)
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

    def answer(self, text: object, ended: str = "stop", **message: object) -> bool:
        """A chat completion; ``message`` are further fields of it."""
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        said = {"role": "assistant", "content": text, **message}
        choices = [{"message": said, "finish_reason": ended}]
        body = {"choices": choices, "usage": usage, "model": "m-2026"}
        return self.send(200, json.dumps(body), "application/json")

    def echo(self, text: str) -> bool:
        """A reply as llama-cpp-python gives it to `echo`: it knows the probabilities of what it is
        shown. A token per two characters, as likely as its place says, and one token more."""
        starts = list(range(0, len(text), 2))
        scores = [None, *(-0.01 * start for start in starts[1:]), -7.0]
        logprobs = {"text_offset": [*starts, len(text)], "token_logprobs": scores}
        choice = {"text": text + "!", "logprobs": logprobs, "finish_reason": "length"}
        return self.send(200, json.dumps({"choices": [choice]}))

    def prompt_logprobs(self, answer: str) -> bool:
        """A reply as vLLM gives it to `prompt_logprobs`: 100 tokens of prompt, the answer's words,
        each as likely as it is long, and the end of the turn."""
        said = [(f" {w}" if i else w, -0.01 * len(w)) for i, w in enumerate(answer.split())]
        said += [("<|im_end|>", -0.25), ("\n", -9.0)]
        tokens = [{"7": {"logprob": p, "decoded_token": t}} for t, p in said]
        known = [None, *[{"7": {"logprob": -3.0, "decoded_token": "x"}}] * 99, *tokens]
        choice = {"message": {"content": "x"}, "finish_reason": "length"}
        return self.send(200, json.dumps({"choices": [choice], "prompt_logprobs": known}))

    def send(
        self, status: int, text: str | bytes, kind: str = "text/plain", **headers: str
    ) -> bool:
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        return True

    def raw(self, data: bytes) -> bool:
        """These bytes for a reply, and the end of the connection."""
        self.wfile.write(data)
        self.close_connection = True
        return True

    def drip(self) -> bool:
        """A reply that never ends, in pieces that come soon enough."""
        with suppress(OSError):  # until the client has had enough
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            for _ in range(600):
                self.wfile.write(b" ")
                time.sleep(0.1)
        self.close_connection = True
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _question(body: dict[str, Any]) -> str:
    """The query of a prompt, in whatever form it came; of the greeting, that it is one."""
    text = body.get("prompt")
    if text is None:
        content = [m for m in body["messages"] if m["role"] == "user"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
    _, asked, question = text.rpartition("Question:")
    return asked + question if asked else "a probe - -"


def _hang(handler: Handler) -> bool:
    time.sleep(1.5)
    return handler.raw(b"")


_BOMB = gzip.compress(bytes(50_000_000), 1)
# What an endpoint may do instead of an answer
BREAKS: dict[str, Callable[[Handler], bool]] = {
    "hangs": _hang,
    "drips": Handler.drip,
    "a page": lambda h: h.send(200, "<html>busy</html>", "text/html"),
    "cut": lambda h: h.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": ['),
    "closed": lambda h: h.raw(b""),
    "no HTTP": lambda h: h.raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "deep": lambda h: h.send(200, "[" * 200_000),
    "long": lambda h: h.send(200, '{"choices": [{"message": {"content": "' + "cat " * 2_000_000),
    "no gzip": lambda h: h.send(200, "cat", Content_Encoding="gzip"),
    "gzip bomb": lambda h: h.send(200, _BOMB, Content_Encoding="gzip"),
    "odd coding": lambda h: h.send(200, _BOMB, Content_Encoding="gzip, gzip"),
    "a number of 5000 digits": lambda h: h.send(200, "9" * 5000),
    "no UTF-8": lambda h: h.send(200, b'{"choices": "\xff"}'),
    "bad date": lambda h: h.send(503, "", Retry_After="Mon, 01 Jan 2024 00:00:00 +99999999999999"),
}


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


def answerer(endpoint: Endpoint, **changes: Any) -> OpenAIAnswerer:
    """An answerer that asks the endpoint."""
    spec = AnswererSpec(model="m", **({"timeout": 5.0, "patience": 20.0} | changes))
    return OpenAIAnswerer.connect(endpoint.url, spec)


def prompts(count: int, image: Path | None = None) -> list[Prompt]:
    """Questions that the endpoint answers with :data:`EXPECTED`."""
    items = [Item("d", "s", n, f"what is {n}", ("a",), "a", image) for n in range(count)]
    return [Prompt(items[n], (items[n - 1],), ("a",)) for n in range(count)]


def texts(found: list[Any]) -> list[str | None]:
    """What was answered."""
    return [a.text for a in found]
