"""A store in a data set of the hub is read like any other, and never written.

The hub here is a stand-in on loopback that speaks its HTTP: the real one is out of reach of tests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from lever_data.relations.db import connect
from lever_data.store.store import Store
from tests.commands import lever
from tests.stores import candidate, commit, new_store

URI = "hf://datasets/lab/icd/store"
TOKEN = "hf_planted"


class StandIn:
    """One data set, whose folder ``store`` is a folder on disk; a page of a listing has 2 files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures = 0
        self.tokens: set[str | None] = set()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        return self._reply(Request(environ))(environ, start)

    def _reply(self, request: Request) -> Response:
        self.tokens.add(request.headers.get("Authorization"))
        if self.failures:
            self.failures -= 1
            return Response("busy", 503)
        for head, answer in (
            ("/api/datasets/lab/icd/tree/main/store", self._tree),
            ("/datasets/lab/icd/resolve/main/store/", self._file),
        ):
            if request.path.startswith(head):
                return answer(request.path.removeprefix(head).strip("/"), request)
        return Response("no", 401, {"X-Error-Code": "RepoNotFound"})

    def _tree(self, path: str, request: Request) -> Response:
        top = self.folder / path
        if not top.is_dir():
            return Response("no", 404, {"X-Error-Code": "EntryNotFound"})
        found = top.rglob("*") if request.args["recursive"] == "true" else top.glob("*")
        entries = [
            {
                "type": "directory" if one.is_dir() else "file",
                "path": f"store/{one.relative_to(self.folder)}",
                "size": one.stat().st_size,
                "oid": str(one.stat().st_mtime_ns),
            }
            for one in sorted(found)
        ]
        at = int(request.args.get("cursor", 0))
        reply = Response(json.dumps(entries[at : at + 2]))
        if at + 2 < len(entries):
            more = f"?recursive={request.args['recursive']}&cursor={at + 2}"
            reply.headers["Link"] = f'<{request.base_url}{more}>; rel="next"'
        return reply

    def _file(self, path: str, request: Request) -> Response:
        file = self.folder / path
        if not file.is_file():
            return Response("no", 404, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        if request.range is None:
            return Response(data)
        ((start, end),) = request.range.ranges
        whole = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return Response(data[start:end], 206, whole)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    store = new_store(tmp_path)
    commit(store, [candidate(0, i, [i + 11], correct=1) for i in range(3)])
    (store.path / "views").mkdir()
    (store.path / "views" / "mine.sql").write_text("select count(*) as n from all_candidates")
    hub = StandIn(store.path)
    server = make_server("127.0.0.1", 0, hub, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "machine"))
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_it_is_read(hub: StandIn, tmp_path: Path) -> None:
    assert connect(URI).sql("from mine").fetchall() == [(3,)]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    lever("copy", URI, tmp_path / "copy")
    there, here = (Store.open(path).runs() for path in (tmp_path / "copy", hub.folder))
    assert [run.files for run in there] == [run.files for run in here]


@pytest.mark.slow
def test_it_is_not_written(hub: StandIn) -> None:
    before = sorted(hub.folder.rglob("*"))
    (run,) = Store.open(URI).runs()
    for command in (["runs", "rm", run.run, "--store", URI], ["copy", hub.folder, URI]):
        done = lever(*command, check=False)
        assert done.returncode == 1 and "a store on the hub is only read" in done.stderr
    assert sorted(hub.folder.rglob("*")) == before


@pytest.mark.slow
def test_faults_are_waited_out(hub: StandIn) -> None:
    hub.failures = 2
    assert len(Store.open(URI).runs()) == 1


def test_no_such_data_set(hub: StandIn) -> None:
    done = lever("runs", "--store", "hf://datasets/lab/other", check=False)
    assert done.returncode == 1
    assert "the data set cannot be read (401 RepoNotFound)" in done.stderr
    assert TOKEN not in done.stderr
    done = lever("runs", "--store", "hf://lab/icd", check=False)
    assert done.returncode == 2 and "hf://datasets/ORG/NAME" in done.stderr
