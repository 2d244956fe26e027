"""A stand-in for Google Cloud Storage on loopback, in memory.

No emulator at hand speaks the XML protocol as obstore does, so this one answers what lever sends
as Google documents the XML API: objects with generations, ``x-goog-if-generation-match``,
ranges, listings in pages, multipart uploads, a bearer token. The real service was never asked.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import unquote
from urllib.request import Request as Call
from urllib.request import urlopen
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from tests.cloud import Quiet

TOKEN = "planted-token-that-must-not-be-shown"
PAGE = 3  # Google's is 1,000
PART = 5 << 20  # bytes that every part but the last must have


@dataclass(frozen=True)
class _Held:
    data: bytes
    meta: dict[str, str]
    generation: int
    modified: datetime

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'

    def heads(self) -> dict[str, str]:
        return {
            "ETag": self.etag,
            "Last-Modified": format_datetime(self.modified, usegmt=True),
            "x-goog-generation": str(self.generation),
            **self.meta,
        }


class _Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str) -> None:
        self.reply = _xml(f"<Error><Code>{code}</Code><Details>{TOKEN}</Details></Error>", status)


def _xml(text: str, status: int = 200, heads: dict[str, str] | None = None) -> Response:
    return Response(text, status, heads, mimetype="application/xml")


class Google:
    """The service: buckets by name, their objects by key."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, _Held]] = {}
        self.uploads: dict[str, tuple[dict[str, str], dict[int, bytes]]] = {}
        self._generation = 0
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Response:
        """One request; what cannot be done is an ``<Error>`` with Google's code."""
        name, _, key = unquote(request.environ["RAW_URI"].partition("?")[0])[1:].partition("/")
        with self._lock:
            try:
                if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise _Refused(401, "AuthenticationRequired")
                if request.method == "PUT" and not key:
                    self.buckets[name] = {}
                    return Response()
                if name not in self.buckets:
                    raise _Refused(404, "NoSuchBucket")
                if not key:
                    return _listed(self.buckets[name], request)
                if {"uploads", "uploadId"} & set(request.args):
                    return self._part(self.buckets[name], key, request)
                return self._object(self.buckets[name], key, request)
            except _Refused as refused:
                return refused.reply

    def _object(self, held: dict[str, _Held], key: str, request: Request) -> Response:
        there = held.get(key)
        if request.method == "PUT":
            wanted = request.headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                raise _Refused(412, "PreconditionFailed")
            return Response(headers=self._keep(held, key, request.data, _meta(request)).heads())
        if there is None:
            raise _Refused(404, "NoSuchKey")
        if request.method == "DELETE":
            del held[key]
            return Response(status=204)
        if request.range is None:
            return Response(there.data, headers=there.heads())
        ((start, end),) = request.range.ranges
        piece, whole = there.data[start:end], len(there.data)
        span = {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{whole}"}
        return Response(piece, 206, headers=there.heads() | span)

    def _keep(self, held: dict[str, _Held], key: str, data: bytes, meta: dict[str, str]) -> _Held:
        self._generation += 1
        held[key] = _Held(data, meta, self._generation, datetime.now(UTC))
        return held[key]

    def _part(self, held: dict[str, _Held], key: str, request: Request) -> Response:
        """A multipart upload: begun, a part of it, completed or given up."""
        if "uploads" in request.args:
            name = uuid.uuid4().hex
            self.uploads[name] = _meta(request), {}
            tag = "InitiateMultipartUploadResult"
            return _xml(f"<{tag}><UploadId>{name}</UploadId></{tag}>")
        name = request.args["uploadId"]
        if name not in self.uploads:
            raise _Refused(404, "NoSuchUpload")
        meta, parts = self.uploads[name]
        if request.method == "PUT":
            parts[int(request.args["partNumber"])] = request.data
            return Response(headers={"ETag": f'"{hashlib.md5(request.data).hexdigest()}"'})
        del self.uploads[name]
        if request.method == "DELETE":
            return Response(status=204)
        named = [int(n.text or "") for n in ElementTree.fromstring(request.data).iter("PartNumber")]
        if any(len(parts[number]) < PART for number in named[:-1]):
            raise _Refused(400, "EntityTooSmall")
        made = self._keep(held, key, b"".join(parts[number] for number in named), meta)
        tag = "CompleteMultipartUploadResult"
        return _xml(f"<{tag}><ETag>{made.etag}</ETag></{tag}>", heads=made.heads())


def _meta(request: Request) -> dict[str, str]:
    return {n.lower(): v for n, v in request.headers if n.lower().startswith("x-goog-meta-")}


def _listed(held: dict[str, _Held], request: Request) -> Response:
    """One page: the keys after the token, those with a delimiter behind the prefix as one."""
    prefix, after = request.args.get("prefix", ""), request.args.get("continuation-token", "")
    cut = request.args.get("delimiter")
    found: dict[str, str] = {}
    for key in sorted(k for k in held if k.startswith(prefix)):
        head, mark, _ = key[len(prefix) :].partition(cut) if cut else (key, "", "")
        if mark:
            folder = f"{prefix}{head}{mark}"
            text = f"<Prefix>{escape(folder)}</Prefix>"
            found[folder] = f"<CommonPrefixes>{text}</CommonPrefixes>"
        else:
            one = held[key]
            found[key] = (
                f"<Contents><Key>{escape(key)}</Key><Generation>{one.generation}</Generation>"
                f"<LastModified>{one.modified:%Y-%m-%dT%H:%M:%S.%f}Z</LastModified>"
                f"<ETag>{escape(one.etag)}</ETag><Size>{len(one.data)}</Size></Contents>"
            )
    left = [name for name in found if name > after]
    body = "".join(found[name] for name in left[:PAGE])
    if len(left) > PAGE:
        body += f"<NextContinuationToken>{escape(left[PAGE - 1])}</NextContinuationToken>"
    return _xml(f"<ListBucketResult>{body}</ListBucketResult>")


@contextmanager
def google() -> Iterator[dict[str, str]]:
    """The server, and what a command needs to reach it."""
    app = Request.application(Google())
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "GOOGLE_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "GOOGLE_BEARER_TOKEN": TOKEN,
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def new_bucket(environment: dict[str, str]) -> str:
    """A bucket that is there and empty; the address of a store in it."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    url, heads = f"{environment['GOOGLE_BASE_URL']}/{name}", {"Authorization": f"Bearer {TOKEN}"}
    urlopen(Call(url, b"", heads, method="PUT")).close()
    return f"gs://{name}/a/store"
