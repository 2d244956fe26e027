"""``serve``: a packed selector over HTTP, one endpoint and a page that describes it.

In go questions as texts or vectors; out come picks as JSON. A request is bounded before it is read,
and what is wrong with it is a 4xx with one sentence. Bound to this machine unless told otherwise; a
page of the web cannot ask, since it may not send JSON without our leave.
"""

from __future__ import annotations

import html
import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from lever_data import __version__
from lever_data.errors import LeverError, UsageError
from lever_train.options.pack import ServeRequest
from lever_train.pack.load import load
from lever_train.pack.packed import PackedSelector


class Ask(BaseModel):
    """What is asked: questions as texts, or as vectors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    questions: list[str | dict[str, str]] | None = Field(
        None, description="The questions: texts, or objects with the fields of the template."
    )
    vectors: list[list[float]] | None = Field(None, description="Their vectors, in place of texts.")
    k: int | None = Field(
        None, ge=1, description="Demonstrations of each; without it the selector stops by itself."
    )
    pools: list[list[int]] | None = Field(
        None, description="Ids that each question may be shown; -1 where a pool is shorter."
    )
    spaces: dict[str, list[list[float]]] | None = Field(
        None,
        description="By name their vectors in further spaces that features read.",
    )


class Choice(BaseModel):
    """One demonstration."""

    id: int = Field(description="Its id in the pool.")
    example: dict[str, Any] = Field(description="The example: question, answer, …")
    log_prob: float = Field(description="Log-probability of choosing it at its step, in nats.")


class Choices(BaseModel):
    """The demonstrations of each question, in the order they are to be shown."""

    picks: list[list[Choice]]


class Refusal(BaseModel):
    """Why a request was refused."""

    error: str
    hint: str | None = None


def serve(request: ServeRequest, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; ``ready`` is told the address once it can be asked.

    Raises:
        LeverError: the folder holds no packed selector.
        UsageError: the address cannot be listened at.
    """
    app = application(load(request.folder), request)
    try:
        listening = socket.create_server((request.host, request.port))
    except OSError as error:
        raise UsageError(
            f"cannot listen at this address ({error.strerror})",
            value=f"{request.host}:{request.port}",
            hint="--port names another",
        ) from None
    ready(f"http://{request.host}:{request.port}")
    with listening:
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


def application(selector: PackedSelector, request: ServeRequest) -> Starlette:
    """The routes: ``POST /select``, ``GET /openapi.json`` and the page ``GET /``."""

    async def select(asked: Request) -> Response:
        kind = asked.headers.get("content-type", "").partition(";")[0]
        if kind.strip().lower() != "application/json":
            return _refused(415, "the body must be JSON", "content-type: application/json")
        body = b""
        async for chunk in asked.stream():
            body += chunk
            if len(body) > request.max_bytes:
                return _refused(413, f"the body is larger than {request.max_bytes:,} bytes")
        try:
            ask = Ask.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            return _refused(422, f"{where}: {first['msg']}", "GET /openapi.json says what is taken")
        if (ask.questions is None) == (ask.vectors is None):
            return _refused(422, "give either questions or vectors")
        inputs = ask.questions if ask.vectors is None else ask.vectors
        if not inputs or len(inputs) > request.max_questions:
            return _refused(422, f"ask from 1 to {request.max_questions:,} questions at once")
        try:
            picks = await run_in_threadpool(
                selector.select, inputs, ask.k, pools=ask.pools, spaces=ask.spaces
            )
        except LeverError as error:
            return _refused(422, error.message(), error.hint)
        return JSONResponse({"picks": [[asdict(pick) for pick in row] for row in picks]})

    async def openapi(_: Request) -> Response:
        return JSONResponse(description())

    async def page(_: Request) -> Response:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(_page(), headers=policy)

    routes = [
        Route("/select", select, methods=["POST"]),
        Route("/openapi.json", openapi),
        Route("/", page),
    ]
    return Starlette(routes=routes)


def description() -> dict[str, Any]:
    """The endpoint as OpenAPI 3.1."""
    models = (Ask, Choices, Choice, Refusal)
    at = "#/components/schemas/{model}"
    schemas = {m.__name__: m.model_json_schema(ref_template=at) for m in models}
    for schema in schemas.values():
        schema.pop("$defs", None)

    def content(model: type[BaseModel]) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": at.format(model=model.__name__)}}}

    refused = {"description": "what is wrong with the request", "content": content(Refusal)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lever: a packed selector", "version": __version__},
        "paths": {
            "/select": {
                "post": {
                    "summary": "Choose demonstrations.",
                    "requestBody": {"required": True, "content": content(Ask)},
                    "responses": {
                        "200": {"description": "the picks", "content": content(Choices)},
                        **dict.fromkeys(("413", "415", "422"), refused),
                    },
                }
            }
        },
        "components": {"schemas": schemas},
    }


def _refused(status: int, error: str, hint: str | None = None) -> Response:
    return JSONResponse({"error": error, "hint": hint}, status_code=status)


def _page() -> str:
    """The description for people; nothing of it is fetched from elsewhere."""
    fields = "".join(
        f"<tr><td><code>{name}</code><td>{html.escape(field.description or '')}"
        for name, field in Ask.model_fields.items()
    )
    example = html.escape(json.dumps({"vectors": [[0.1, 0.2]], "k": 2}))
    answer = html.escape(json.dumps({"picks": [[{"id": 7, "example": {}, "log_prob": -0.3}]]}))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>lever serve</title>"
        "<meta name=viewport content='width=device-width'><meta name=color-scheme "
        "content='light dark'><style>body{font:16px/1.5 system-ui;max-width:46rem;margin:2rem auto;"
        "padding:0 1rem}td{padding:.2rem 1rem .2rem 0;vertical-align:top}pre{overflow:auto}</style>"
        f"<h1>A packed selector</h1><p><code>POST /select</code>, as JSON:<table>{fields}</table>"
        f"<pre>{example}</pre><p>It answers with the demonstrations of each question:"
        f"<pre>{answer}</pre><p>A request that cannot be answered gets a 4xx with "
        "<code>error</code> and <code>hint</code>. <a href=openapi.json>openapi.json</a>"
    )
