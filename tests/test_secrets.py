"""Secrets in the environment never reach the store, an output folder, stdout or stderr."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.store.store import Store
from tests.commands import Done, lever
from tests.endpoint import EXPECTED, Endpoint, Handler, answerer, prompts, serving, texts
from tests.rollouts import add_images, make_world, rows
from tests.torture.harness import write_rl_data
from tests.training import Bench

KEY = "sk-proj-Zx81secretQw"
SECRETS = {
    "OPENAI_API_KEY": KEY,
    "HF_TOKEN": "hf_Lk92secretRt",
    "AWS_SECRET_ACCESS_KEY": "Aw73secretTy",
    "LEVER_PASSWORD": "Pw55secretUi",
}


def _texts(folder: Path) -> list[str]:
    """What every file below a folder says, Parquet and Arrow decoded."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.append(f"{path}\n{path.read_bytes().decode('latin-1')}")
        if path.suffix == ".parquet":
            found.append(str(pq.read_table(path, partitioning=None).to_pylist()))
        if path.suffix == ".arrow":
            found.append(str(pa.ipc.open_file(path).read_all().to_pylist()))
    return found


@pytest.mark.long
def test_no_command_keeps_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    bench = Bench(tmp_path)
    store, out = bench.store.path, tmp_path / "out"
    source = write_rl_data(tmp_path / "a.json", 20)
    vectors = ["--query-embeddings", bench.vectors, "--hidden-dim", 8]
    done: list[Done] = []
    for words in (
        ["ingest", source, "--store", store, "--dataset", "e", "--split", "train"],
        ["train", "--store", store, "--run", bench.run.run, "--out", out, *vectors],
        ["audit", "--store", store, "--json", out / "a.json", "--html", out / "a.html"],
        ["export", "--store", store, "--run", bench.run.run, "--out", out / "back.json"],
        ["query", "select * from duckdb_settings()", "--store", store],
        ["query", "select * from duckdb_secrets()", "--store", store],
        ["--debug", "train", "--store", store, "--view", "nope", "--out", out, *vectors],
        ["--debug", "generate", "--store", store, "--answerer", "openai:http://127.0.0.1:9/v1"],
    ):
        done.append(lever(*words, check=False))
    assert [d.returncode for d in done[:4]] == [0, 0, 0, 0], [d.stderr for d in done]
    assert len(Store.open(store).runs()) >= 2
    texts = _texts(store) + _texts(out) + [d.stdout for d in done] + [d.stderr for d in done]
    assert len(texts) > 25
    for name, value in SECRETS.items():
        assert not [text[:200] for text in texts if value in text], name


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@pytest.mark.long
def test_a_key_that_the_endpoint_repeats_is_not_kept(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In answers, in refusals and in rejections."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    world = make_world(tmp_path, queries=10)
    add_images(world)

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if "number 4?" in question:
            return handler.send(422, f"not for {KEY}")
        return handler.answer(f"a {KEY} dog")

    endpoint.fault = fault
    asked = ["--answerer", f"openai:{endpoint.url}", "--model", "m"]
    argv = world.argv(*asked, "--image-root", world.images, "--max-failed", "1")
    done = [lever(*argv)]
    (run,) = Store.open(world.store).runs()
    found = rows(run)
    assert {r["generation"] for r in found} == {"a *** dog", None}
    assert {r["error"] for r in found} == {"HTTP 422: not for ***", None}
    endpoint.fault = lambda handler, question, attempt: handler.send(403, f"away with {KEY}")
    done.append(lever("--debug", *argv, "--seed", "1", check=False))
    assert done[1].returncode == 1 and "away with ***" in done[1].stderr
    kept = _texts(world.store)
    assert sum("a *** dog" in text for text in kept) > 1  # the rows' and the answer cache's
    shown = [text for one in done for text in (one.stdout, one.stderr)]
    assert not [text[:200] for text in kept + shown if KEY in text]


@pytest.mark.parametrize("tail", ["\nx", " x", "é", "\x7f", "\udcff"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + tail)
    world = make_world(tmp_path, queries=10)
    add_images(world)
    asked = ["--answerer", "openai:http://127.0.0.1:9/v1", "--model", "m"]
    done = lever(*world.argv(*asked, "--image-root", world.images), check=False)
    assert done.returncode == 2
    assert "OPENAI_API_KEY holds whitespace or characters beyond ASCII" in done.stderr
    assert KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_whitespace_around_a_key_is_not_sent(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert texts(answerer(endpoint).answer(prompts(1))) == EXPECTED[:1]
    assert endpoint.headers == [f"Bearer {KEY}"]
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(UsageError, match="holds only whitespace"):
        answerer(endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert texts(answerer(endpoint).answer(prompts(1))) == EXPECTED[:1]
    assert endpoint.headers[1:] == [None]


@pytest.mark.parametrize("way", ["header line", "type", "coding", "refusal", "rejection"])
def test_no_error_nor_its_cause_spells_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    key = "sk-'4711'\"a\\b/c"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if way == "header line":  # the library quotes it
            return handler.raw(f"HTTP/1.1 200 OK\r\nno header {key}\r\n\r\n".encode())
        if way == "type":
            return handler.send(200, "<html>", f"text/{key}")
        if way == "coding":
            return handler.send(200, "cat", Content_Encoding=key)
        in_json = json.dumps({"error": key}).replace("/", "\\/")
        return handler.send(400 if way == "refusal" else 404, in_json)

    endpoint.fault = fault
    try:
        shown = str(answerer(endpoint, patience=0.1).answer(prompts(1))[0].error)
    except LeverError as error:
        shown = "".join(traceback.format_exception(error))
    assert "***" in shown and "4711" not in shown


def test_a_key_in_an_answer_is_hidden_unless_it_is_no_secret(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.answer(f"none but {KEY}")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert texts(answerer(endpoint).answer(prompts(1))) == ["none but ***"]
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # as servers without keys are given
    assert texts(answerer(endpoint).answer(prompts(1))) == [f"none but {KEY}"]
