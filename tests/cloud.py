"""An S3 server on loopback (moto's) whose replies a test can spoil, and a bucket for each test."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote
from urllib.request import Request as Call
from urllib.request import urlopen

import obstore
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import WSGIRequestHandler, make_server

KEY = "AKIAPLANTEDPLANTED01"
SECRET = "planted/secret/that/must/not/be/shown"

Reply = Iterable[bytes]


@dataclass(frozen=True)
class Request:
    """One request: ``PUT runs/run=…/manifest.json``, and its number since the last spoiling."""

    number: int
    method: str
    path: str
    query: str
    environ: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path}{'?' if self.query else ''}{self.query}"


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, kind: str, message: str, *args: Any) -> None:
        pass


class Cloud:
    """The server. ``spoil`` sees each request first: what it returns is the reply."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.spoil: Callable[[Request, Callable[..., Any]], Reply | None] | None = None
        self.seen: list[Request] = []
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(host, 0, self._answer, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Cloud:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Reply:
        path = unquote(environ["PATH_INFO"]).partition("/")[2].partition("/")[2]
        query = environ["QUERY_STRING"]
        request = Request(len(self.seen), environ["REQUEST_METHOD"], path, query, environ)
        self.seen.append(request)
        if self.spoil is not None and (reply := self.spoil(request, start)) is not None:
            return reply
        return self.forward(request, start)

    def forward(self, request: Request, start: Callable[..., Any]) -> Reply:
        """The reply of the S3 server itself."""
        return self._s3(request.environ, start)  # type: ignore[no-any-return]

    def calm(self) -> None:
        """Forget what was seen, spoil nothing."""
        self.spoil = None
        self.seen.clear()


@dataclass(frozen=True)
class TestBucket:
    """A fresh bucket of the cloud, seen past lever."""

    cloud: Cloud
    name: str
    __test__ = False

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/a/store"

    @property
    def objects(self) -> S3Store:
        return S3Store(self.name, prefix="a/store", client_options={"allow_http": True})

    def listed(self) -> list[str]:
        return sorted(found["path"] for found in obstore.list(self.objects).collect())

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self.objects, key).bytes())

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self.objects, key, data)

    def age(self, key: str, by: timedelta) -> None:
        """Set back when the bucket says an object was put."""
        held = s3_backends["123456789012"]["aws"].get_object(self.name, f"a/store/{key}")
        held.last_modified -= by

    def put_under(self, key: str, data: bytes) -> None:
        """As other tools do, which name it as they like."""
        _put(f"{self.cloud.url}/{self.name}/a/store/{quote(key)}", data)


def _put(url: str, data: bytes) -> None:
    kind = {"Content-Type": "application/octet-stream"}  # else moto takes it for a form
    urlopen(Call(url, data, kind, method="PUT")).close()


def new_bucket(cloud: Cloud) -> TestBucket:
    """A bucket that is there and empty."""
    cloud.calm()
    name = f"b-{uuid.uuid4().hex[:12]}"
    _put(f"{cloud.url}/{name}", b"")
    cloud.calm()
    return TestBucket(cloud, name)


def environment(cloud: Cloud) -> dict[str, str]:
    """What a command needs to reach the cloud."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": cloud.url,
    }


def fail(status: str, code: str, start: Callable[..., Any]) -> Reply:
    """A reply as S3 fails."""
    body = f"<Error><Code>{code}</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>".encode()
    start(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
    return [body]


def cut(reply: Reply, keep: int) -> Iterator[bytes]:
    """The first bytes of a reply; then the connection breaks."""
    for piece in reply:
        yield piece[:keep]
        raise ConnectionAbortedError
