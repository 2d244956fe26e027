"""The endpoint answerer against a real HTTP server on loopback, with every fault injected."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lever_cli.__main__ import main
from PIL import Image

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import SYSTEM_PROMPT, Template
from lever_data.store.store import Store
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers import openai as flow
from lever_train.rollout.answerers import outages
from lever_train.rollout.answerers.openai import OpenAIAnswerer
from lever_train.rollout.answerers.openai_reply import MAX_BYTES
from lever_train.rollout.ask import Asker
from lever_train.rollout.cache import AnswerCache
from lever_train.rollout.generate import STORED, generate
from lever_train.rollout.resolve import resolve
from tests.endpoint import BREAKS, EXPECTED, Endpoint, Handler, answerer, prompts, serving, texts
from tests.rollouts import World, add_images, make_world, rows

KEY = "sk-secret-4711"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


def test_the_request_is_the_prompt_of_the_legacy_system(endpoint: Endpoint, tmp_path: Path) -> None:
    image = tmp_path / "i.png"
    Image.new("RGB", (4, 3), "red").save(image)
    one = answerer(endpoint)
    assert texts(one.answer(prompts(2, image)[1:])) == [EXPECTED[1]]
    (body,) = endpoint.seen
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 5, 0)
    system, user = body["messages"]
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["image_url", "text", "image_url", "text"]
    url = user["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.split(",")[1]) == image.read_bytes()
    assert user["content"][1]["text"] == "Question:what is 0 Short answer:a"
    assert user["content"][3]["text"] == "Question:what is 1 Short answer:"
    assert (one.usage.answers, one.usage.prompt_tokens, one.usage.completion_tokens) == (1, 100, 2)


@pytest.mark.parametrize("content", [b"", b"<html>404", b"cut"])
def test_a_file_that_is_no_image_fails_alone(
    endpoint: Endpoint, tmp_path: Path, content: bytes
) -> None:
    image = tmp_path / "i.jpg"
    image.write_bytes(content)
    found = answerer(endpoint).answer([*prompts(1), *prompts(1, image)])
    assert texts(found) == [EXPECTED[0], None]
    assert "an image cannot be read: it is" in str(found[1].error)


@pytest.mark.slow
def test_requests_run_side_by_side_within_the_bound(endpoint: Endpoint) -> None:
    endpoint.delay = 0.02
    assert texts(answerer(endpoint, concurrency=5).answer(prompts(40))) == EXPECTED
    assert 1 < endpoint.most_active <= 5


@pytest.mark.long
def test_overload_and_server_errors_are_never_lost(endpoint: Endpoint) -> None:
    codes = [429, 500, 502, 503, 529]

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if attempt > 2:
            return False
        status = codes[(len(question) + attempt) % 5]
        return handler.send(status, "busy", Retry_After="0.01")

    endpoint.fault = fault
    assert texts(answerer(endpoint).answer(prompts(40))) == EXPECTED
    assert set(endpoint.tries.values()) == {3}


@pytest.mark.long
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(endpoint: Endpoint, form: str) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        moment = datetime.now(UTC) + timedelta(seconds=2)
        value = "1.2" if form == "seconds" else format_datetime(moment, usegmt=True)
        return attempt == 1 and handler.send(429, "wait", Retry_After=value)

    endpoint.fault = fault
    assert texts(answerer(endpoint).answer(prompts(1))) == EXPECTED[:1]
    ((first, second),) = endpoint.times.values()
    assert second - first >= (1.2 if form == "seconds" else 0.95)  # a date has whole seconds


@pytest.mark.long
@pytest.mark.parametrize("value", ["0", "Mon, 01 Jan 2024 00:00:00 GMT"])
def test_an_endpoint_that_asks_for_no_wait_is_not_flooded(endpoint: Endpoint, value: str) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(429, "", Retry_After=value)
    with pytest.raises(LeverError, match="does not answer"):
        answerer(endpoint, patience=1.0).answer(prompts(1))
    assert len(endpoint.seen) <= 6  # waits of a quarter second and more, each twice the last


@pytest.mark.long
def test_broken_connections_pages_and_hangs_are_tried_again(endpoint: Endpoint) -> None:
    breaks = list(BREAKS.values())

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if attempt == 1:
            breaks[int(question.split()[-3])](handler)
        return attempt == 1

    endpoint.fault = fault
    found = answerer(endpoint, timeout=0.7).answer(prompts(len(breaks)))
    assert texts(found) == EXPECTED[: len(breaks)]
    assert set(endpoint.tries.values()) == {2}


def test_a_prompt_that_is_refused_fails_alone(endpoint: Endpoint) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        return "is 3" in question and handler.send(400, f"too long for {KEY}")

    endpoint.fault = fault
    found = answerer(endpoint).answer(prompts(6))
    assert texts(found) == [*EXPECTED[:3], None, *EXPECTED[4:6]]
    assert found[3].error == f"HTTP 400: too long for {KEY}"
    assert endpoint.tries["Question:what is 3 Short answer:"] == 1


@pytest.mark.long
def test_a_prompt_that_never_gets_through_fails_where_others_do(endpoint: Endpoint) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if "is 1 " in question:
            return handler.send(200, "<html>", "text/html")
        if "is 4 " in question:
            return handler.drip()
        if "is 5 " in question:
            return handler.send(200, " " * (MAX_BYTES + 1))
        return "is 2 " in question and handler.send(500, "crash", Retry_After="0.05")

    endpoint.fault = fault
    found = answerer(endpoint, patience=1.5, timeout=0.5).answer(prompts(6))
    assert texts(found) == [EXPECTED[0], None, None, EXPECTED[3], None, None]
    assert found[1].error == "gave up: the body is not a completion (text/html)"
    assert found[2].error == "gave up: HTTP 500: crash"
    assert found[4].error == "gave up: no whole reply within 0.5 s"
    assert found[5].error == "gave up: the body is longer than 4 MiB"
    assert endpoint.tries["a probe - -"] >= 1  # it lives, so the prompts are at fault
    assert endpoint.tries["Question:what is 1 Short answer:"] == 3


@pytest.mark.long
def test_an_endpoint_that_is_down_stops_the_job(endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(503, "no", Retry_After="0.1")
    with pytest.raises(LeverError, match="does not answer \\(HTTP 503: no\\)") as error:
        answerer(endpoint, patience=0.5).answer(prompts(3))
    assert "run the same command again" in str(error.value.hint)
    gone = OpenAIAnswerer.connect("http://127.0.0.1:9/v1", AnswererSpec(model="m", patience=0.3))
    with pytest.raises(LeverError, match="ConnectError"):
        gone.answer(prompts(2))


@pytest.mark.long
def test_patience_is_the_jobs_and_an_outage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """However many prompts wait: their patience does not add up."""
    gone = OpenAIAnswerer.connect("http://127.0.0.1:9/v1", AnswererSpec(model="m", patience=1.0))
    with pytest.raises(LeverError, match="does not answer"):
        gone.answer(prompts(40))
    (line,) = caplog.messages
    assert line.startswith("http://127.0.0.1:9/v1 does not answer (ConnectError")


def test_patience_counts_from_the_first_knock(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a command takes to start is a part of it; a server that has come meanwhile answers."""
    monkeypatch.setattr(outages, "monotonic", lambda: float("-inf"))
    spec = AnswererSpec(model="m", patience=3600)
    outages.knock("openai:http://127.0.0.1:9/v1")
    with pytest.raises(LeverError, match="does not answer"):
        OpenAIAnswerer.connect("http://127.0.0.1:9/v1/", spec).answer(prompts(2))
    outages.knock(f"openai:{endpoint.url}")
    assert outages.silent_since(endpoint.url) is None
    for other in ("nearest", "openai:http://[", "openai:http://127.0.0.1:port/v1"):
        outages.knock(other)  # refused where it is read


@pytest.mark.long
def test_a_long_outage_is_told_every_30_seconds(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the server's own words, at a server whose every refusal takes ten seconds."""
    now = [0.0]

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        now[0] += 10.0
        return handler.send(503, f"full at {now[0]:g}")

    endpoint.fault = fault
    monkeypatch.setattr(flow, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(flow, "_FIRST_WAIT", 0.001)
    with pytest.raises(LeverError, match="does not answer"):
        answerer(endpoint, concurrency=1, patience=75).answer(prompts(1))
    told = [re.findall(r"full at (\d+).*for at most 75 s", line) for line in caplog.messages]
    assert told == [["10"], ["40"], ["70"]]


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_rejected_key_stops_at_once_and_is_not_repeated(
    endpoint: Endpoint, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        return "is 5 " in question and handler.send(status, f"bad key {KEY}")

    endpoint.fault = fault
    with pytest.raises(LeverError, match=f"HTTP {status}") as error:
        Asker(answerer(endpoint, concurrency=1), AnswerCache(tmp_path)).ask(prompts(8))
    assert KEY not in str(error.value) and "bad key ***" in str(error.value)
    # four are paid: the first of them is shown the last, and so is sent last
    assert Asker(answerer(endpoint), AnswerCache(tmp_path)).missing(prompts(8)) == 4


def test_bad_specifications_are_refused() -> None:
    with pytest.raises(UsageError, match="needs the name of a model"):
        OpenAIAnswerer.connect("http://127.0.0.1:1/v1", AnswererSpec())
    for url in ("http://", "http:///v1", "http://h\x01/v1", "http://xn--/v1", "http://\udcff/v1"):
        with pytest.raises(UsageError, match="no URL of an endpoint"):
            OpenAIAnswerer.connect(url, AnswererSpec(model="m"))
    with pytest.raises(UsageError, match="must not hold credentials"):
        OpenAIAnswerer.connect("http://me:pw@127.0.0.1:1/v1", AnswererSpec(model="m"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    found = make_world(tmp_path, queries=10)
    add_images(found)
    return found


def argv(world: World, endpoint: Endpoint, *more: str) -> list[str]:
    words = ["--answerer", f"openai:{endpoint.url}", "--model", "Qwen/Small"]
    return world.argv(*words, "--image-root", str(world.images), *more)


def lever(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


@pytest.mark.long
def test_the_command_as_written_and_no_secret_anywhere(
    world: World,
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert lever(*argv(world, endpoint)) == 0
    shown = capfd.readouterr()
    assert set(endpoint.headers) == {f"Bearer {KEY}"}
    assert KEY not in shown.out + shown.err
    files = [p for p in world.store.rglob("*") if p.is_file()]
    assert files and not any(KEY.encode() in p.read_bytes() for p in files)
    (run,) = Store.open(world.store).runs()
    assert run.details["answerer"] == {
        "server": endpoint.url,
        "model": "Qwen/Small",
        "reported_model": "m-2026",
        "not_taken": [],
    }
    found = rows(run)
    assert {r["scorer"] for r in found} == {f"Qwen/Small#{Template().sha256()[:8]}"}
    assert all(r["expected_score"] is None for r in found)  # nobody asked for it
    assert all(r["generation"].endswith("\n") for r in found)
    asked = len(endpoint.seen)
    assert lever(*argv(world, endpoint, "--seed", "1")) == 0
    beams = sum(r["gen_method"] == "beam" for r in found)
    again = len(endpoint.seen) - STORED  # what is known is not asked, but for these
    assert asked <= again < 2 * asked - beams + 1


@pytest.mark.slow
def test_other_images_make_another_run(world: World) -> None:
    """Under the same names: what a model is shown counts, and what it may not be shown does not."""
    pool = np.load(world.pool)
    for row in pool:  # example 9 is in none of them
        row[row == 9] = min(set(range(40)) - {9, *row.tolist()})
    np.save(world.pool, pool)
    spec = "openai:http://127.0.0.1:9/v1"
    request = world.request(spec=spec, model="m", image_root=world.images, limit=9)

    def name() -> str:
        return resolve(request).spec.run_id()

    first, paths = name(), sorted(world.images.iterdir())
    assert name() == first
    kept = paths[3].read_bytes()
    paths[9].write_bytes(b"no query, and in no pool")
    assert name() == first
    paths[3].write_bytes(paths[4].read_bytes())
    assert name() != first
    paths[3].unlink()  # its rows would say so; where it is back, they are made anew
    assert name() != first
    paths[3].write_bytes(kept)
    assert name() == first


@pytest.mark.long
def test_a_job_goes_on_after_the_endpoint_was_down(world: World, endpoint: Endpoint) -> None:
    down = threading.Event()

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if len(endpoint.seen) > 40:
            down.set()
        return down.is_set() and handler.send(503, "no", Retry_After="0.05")

    endpoint.fault = fault
    request = world.request(
        spec=f"openai:{endpoint.url}", model="m", image_root=world.images, patience=0.4
    )
    with pytest.raises(LeverError):
        generate(request)
    assert down.is_set()
    endpoint.fault = None
    outcome = generate(request)
    assert outcome.report.failed == 0 and outcome.run is not None
    distinct = len({(r["query_id"], *r["pointer"]) for r in rows(outcome.run)})
    assert outcome.tally.asked == distinct - 40  # 40 were paid for and kept


@pytest.mark.long
def test_failed_answers_are_rows_that_stay_out_of_training(
    world: World, endpoint: Endpoint
) -> None:
    from lever_data.relations.db import connect

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        return "number 4?" in question and handler.send(422, "no such image")

    endpoint.fault = fault
    outcome = generate(
        world.request(
            spec=f"openai:{endpoint.url}", model="m", image_root=world.images, max_failed=0.5
        )
    )
    found = rows(outcome.run)
    failed = [r for r in found if r["query_id"] == 4]
    assert outcome.report.failed == len(failed) == sum(r["eval_failed"] for r in found)
    for row in failed:
        assert row["error"] == "HTTP 422: no such image"
        assert row["score"] is None and row["eval_mode"] is None
    assert "answers failed" in outcome.notices[0]
    con = connect(world.store)
    assert con.execute("select count(*) from all_candidates where query_id = 4").fetchall() == [
        (0,)
    ]
    (world.images / "COCO_train2014_000000000002.jpg").unlink()
    again = generate(
        world.request(
            spec=f"openai:{endpoint.url}",
            model="m",
            image_root=world.images,
            seed=1,
            max_failed=0.5,
        )
    )
    lost = {r["error"] for r in rows(again.run) if r["query_id"] == 2}
    assert len(lost) == 1 and "an image cannot be read: No such file" in lost.pop()
