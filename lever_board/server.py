"""The server: pages of one store on 127.0.0.1, for whoever knows the token.

In goes a :class:`Board`; out come answers to GET requests. Every address begins with the token, a
request by another host name or from another origin is refused (so no page of the web can read the
store through the reader's browser), and the policy of every answer lets nothing load from outside.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lever_board.board import Board
from lever_board.page import OWN, Links, PageRequest
from lever_board.pages import PAGES, own_static, show
from lever_data.errors import LeverError, UsageError
from lever_data.relations.query import write_query
from lever_data.report.page import SCRIPTS, STYLES, static

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_DOWNLOADS = {
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
}


class ServedLinks:
    """Addresses beside the page itself: all pages lie in one folder, that of the token."""

    is_live = True

    def page(self, name: str, **parameters: object) -> str | None:
        """The address of a page."""
        given = {key: value for key, value in parameters.items() if value not in (None, "", [])}
        return f"{name}?{urlencode(given, doseq=True)}" if given else name

    def image(self, dataset: str, split: str, example_id: int) -> str | None:
        """The address of a picture."""
        return f"image?{urlencode({'dataset': dataset, 'split': split, 'id': example_id})}"

    def static(self, name: str) -> str:
        """The address of a script or style."""
        return f"static/{name}"


class Guard:
    """Refuses who has not the token, comes by another name, or from another origin."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse."""
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if reason := self._why_not(scope):
            await PlainTextResponse(f"{reason}\n", 403)(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _why_not(self, scope: Scope) -> str | None:
        headers = dict(scope["headers"])
        if headers.get(b"host") not in self.hosts:
            return "this board answers to 127.0.0.1 alone"
        if headers.get(b"origin", b"") not in {b"", *self.origins}:
            return "this board answers no other site"
        token = str(scope["path"]).split("/")[1]
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return "the address lacks the token that `lever board` printed"
        return None


def application(board: Board, token: str, port: int) -> Starlette:
    """The board as an ASGI application that is reached on ``port``."""
    links = ServedLinks()
    known = {name: static(name) for name in (*SCRIPTS, *STYLES)}
    known |= {name: own_static(name) for name in OWN}

    def asked(request: Request) -> PageRequest:
        return asked_of(board, links, request)

    def start(request: Request) -> Response:
        return RedirectResponse(f"/{token}/store")

    def page(request: Request) -> Response:
        name = request.path_params["page"]
        if name not in PAGES:
            return PlainTextResponse("there is no such page\n", 404)
        text, status = show(name, asked(request))
        return Response(text, status, media_type="text/html")

    def script(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in known:
            return PlainTextResponse("there is no such file\n", 404)
        return Response(known[name], media_type=_TYPES[name.rpartition(".")[2]])

    routes = [
        Route(f"/{token}/", start),
        Route(f"/{token}", start),
        Route(f"/{token}/static/{{name}}", script),
        Route(f"/{token}/image", _of(image, asked)),
        Route(f"/{token}/download", _of(download, asked)),
        Route(f"/{token}/{{page}}", page),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token, port=port)])


def _of(
    answer: Callable[[PageRequest], Response], asked: Callable[[Request], PageRequest]
) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        try:
            return answer(asked(request))
        except LeverError as error:
            return PlainTextResponse(f"{error.message()}\n{error.hint or ''}\n", 400)

    return endpoint


def asked_of(board: Board, links: Links, request: Request) -> PageRequest:
    """The parameters of a request, and the store as it is now."""
    values = request.query_params
    many = {key: values.getlist(key) for key in values}
    return PageRequest(board, board.state(), links, dict(values), many)


def image(asked: PageRequest) -> Response:
    """The picture of an example, small."""
    from lever_board.pictures import thumbnail
    from lever_board.query_pages import example_of

    item = example_of(asked, asked.text("dataset"), asked.text("split"), asked.number("id", -1))
    found = thumbnail(item, asked.board.images)
    if found is None:
        return PlainTextResponse("there is no such picture\n", 404)
    return Response(found, media_type="image/webp", headers={"cache-control": "max-age=600"})


def download(asked: PageRequest) -> Response:
    """A query's whole result as a file."""
    form = asked.text("form", "csv")
    if form not in _DOWNLOADS:
        raise UsageError("unknown format", value=form)
    asked.board.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=asked.board.folder, delete=False) as out:
        file = Path(out.name)
        try:
            write_query(
                asked.board.store.path, asked.text("sql"), form, out, asked.state.query_options()
            )
        except LeverError:
            file.unlink()
            raise
    return FileResponse(
        file,
        media_type=_DOWNLOADS[form],
        filename=f"lever.{form}",
        background=BackgroundTask(file.unlink),
    )


class Serving:
    """A board that waits on a port of 127.0.0.1, and the address of its first page."""

    def __init__(self, board: Board, port: int = 0) -> None:
        self.board, self.token = board, secrets.token_urlsafe(18)
        self.socket = _bound(port)
        self.port = int(self.socket.getsockname()[1])
        app = application(board, self.token, self.port)
        # no log: an address holds the token
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        self.server = uvicorn.Server(config)

    @property
    def address(self) -> str:
        """Of the first page, with the token."""
        return f"http://127.0.0.1:{self.port}/{self.token}/store"

    def serve(self) -> None:
        """Answer until an interrupt, or until ``server.should_exit`` is set."""
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.socket.close()
            self.board.close()


def _bound(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(("127.0.0.1", port))
        made.listen()  # who has the address may come at once, and waits
    except OSError as error:
        made.close()
        raise UsageError(
            f"the port cannot be used ({error.strerror})",
            value=port,
            hint="--port 0 takes a free one",
        ) from None
    return made
