"""Answers flow: no prompt waits for another talk's, what is paid is kept, failures have an end."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt
from lever_data.store.store import Store
from lever_train.options.rollout import Request
from lever_train.rollout import cache as module
from lever_train.rollout.ask import Asker, Talk, Tally
from lever_train.rollout.cache import AnswerCache
from lever_train.rollout.generate import forecast, generate
from lever_train.rollout.repeat import repeat
from tests.commands import lever
from tests.endpoint import EXPECTED, Endpoint, Handler, answerer, prompts, serving
from tests.rollouts import World, add_images, make_world, rows

WAIT = 60.0  # seconds until a test that would hang fails


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@pytest.fixture
def world(tmp_path: Path) -> World:
    found = make_world(tmp_path, queries=10)
    add_images(found)
    return found


def request(world: World, endpoint: Endpoint, **more: Any) -> Request:
    spec = f"openai:{endpoint.url}"
    return world.request(spec=spec, model="m", image_root=world.images, **more)


def talk(asked: list[Prompt], rounds: int = 1) -> Talk[list[str | None]]:
    found = []
    for _ in range(rounds):
        found = [answer.text for _, answer in (yield asked)]
    return found


@pytest.mark.long
def test_a_slow_answer_holds_up_nothing_but_its_own_talk(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    """The slow one is answered when all the others are: with a barrier that would be never."""
    others = threading.Event()

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if len(endpoint.tries) == len(EXPECTED):
            others.set()
        if "is 3 " in question:
            assert others.wait(WAIT)
        return False

    endpoint.fault = fault
    asker = Asker(answerer(endpoint, concurrency=2, timeout=WAIT), AnswerCache(tmp_path))
    asked = prompts(40)
    ended = list(asker.serve(talk(asked[n : n + 8], rounds=2) for n in range(0, 40, 8)))
    assert sorted(ended, key=lambda texts: EXPECTED.index(str(texts[0]))) == [
        EXPECTED[n : n + 8] for n in range(0, 40, 8)
    ]
    assert [texts[0] for texts in ended].index(
        EXPECTED[0]
    ) >= 3  # the last talk may still be on its way
    assert (asker.tally.asked, asker.tally.hits) == (40, 40)  # the second rounds are known


def test_talks_that_ask_the_same_pay_once(endpoint: Endpoint, tmp_path: Path) -> None:
    asker = Asker(answerer(endpoint), AnswerCache(tmp_path))
    assert list(asker.serve(talk(prompts(5)) for _ in range(3))) == [EXPECTED[:5]] * 3
    assert (asker.tally.asked, asker.tally.hits, len(endpoint.seen)) == (5, 10, 5)


def test_an_answer_is_on_disk_while_others_of_its_talk_are_out(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill at any time costs is what is in flight and what is younger than the flush."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    asker = Asker(answerer(endpoint, timeout=WAIT), AnswerCache(tmp_path))
    keys = [asker.key(p) for p in prompts(8)]
    enough = threading.Event()

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if "is 3 " in question:
            while sum(a is not None for a in AnswerCache(tmp_path).get(keys)) < 7:
                assert not enough.wait(0.05)
        return False

    endpoint.fault = fault
    assert [a.text for _, a in asker.ask(prompts(8))] == EXPECTED[:8]


def test_an_interrupted_job_keeps_what_arrived(endpoint: Endpoint, tmp_path: Path) -> None:
    def interrupt(tally: Tally) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Asker(answerer(endpoint, concurrency=4), AnswerCache(tmp_path), interrupt).ask(prompts(40))
    paid = len(endpoint.tries)
    asker = Asker(answerer(endpoint), AnswerCache(tmp_path))
    assert 40 - paid <= asker.missing(prompts(40)) <= 40 - paid + 4  # but for those in flight


SOONER = """
import sys
from lever_cli.__main__ import main
from lever_train.rollout import cache
cache.FLUSH_SECONDS = 1.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("paid", [28, 7])
def test_a_killed_job_asks_again_what_was_out_and_nothing_else(
    world: World, endpoint: Endpoint, paid: int
) -> None:
    """The endpoint answers so many and then holds its tongue; once they are on disk, kill -9."""
    arrivals, killed = itertools.count(1), threading.Event()

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        if next(arrivals) <= paid:
            return False
        assert killed.wait(WAIT)
        return handler.raw(b"")

    endpoint.fault = fault
    words = ["--answerer", f"openai:{endpoint.url}", "--model", "m", "--concurrency", "4"]
    argv = world.argv(*words, "--image-root", str(world.images))
    with subprocess.Popen([sys.executable, "-c", SOONER, *argv]) as job:
        while _on_disk(world) < paid:
            assert job.poll() is None
            killed.wait(0.05)
        job.kill()
    killed.set()
    endpoint.fault = None
    outcome = generate(request(world, endpoint))
    distinct = {(r["query_id"], *r["pointer"]) for r in rows(outcome.run)}
    assert outcome.tally.asked == len(distinct) - paid


def _on_disk(world: World) -> int:
    segments = world.store.glob("cache/*/seg-*.arrow")
    return sum(pa.ipc.open_file(path).get_batch(0).num_rows for path in segments)


def test_a_talk_that_is_given_up_lets_go_of_what_it_holds(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    held = []

    def holding() -> Talk[None]:
        try:
            yield prompts(4)
        finally:
            held.append("let go")

    endpoint.fault = lambda handler, question, attempt: handler.send(401, "no")
    asker = Asker(answerer(endpoint), AnswerCache(tmp_path))
    with pytest.raises(LeverError, match="401"):
        list(asker.serve([holding()]))
    assert held == ["let go"]


@pytest.mark.long
def test_too_many_failures_stop_with_their_reasons(world: World, endpoint: Endpoint) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        odd = int(question.split("?")[0].split()[-1]) % 2 == 1
        return odd and handler.send(422, "no such image")

    endpoint.fault = fault
    with pytest.raises(LeverError, match=r"of \d+ answers failed") as error:
        generate(request(world, endpoint))
    assert "x HTTP 422: no such image" in str(error.value)
    assert "--max-failed" in str(error.value.hint)
    assert not Store.open(world.store).runs()
    asked = len(endpoint.seen)
    endpoint.fault = None
    outcome = generate(request(world, endpoint))
    assert outcome.report.failed == 0
    distinct = len({(r["query_id"], *r["pointer"]) for r in rows(outcome.run)})
    assert len(endpoint.seen) < asked + distinct  # what was paid was kept


@pytest.mark.long
def test_a_job_of_failures_alone_is_no_run(world: World, endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(400, "not that word")
    with pytest.raises(LeverError, match=r"all \d+ answers failed.*not that word"):
        generate(request(world, endpoint, max_failed=1.0))
    words = ["--answerer", f"openai:{endpoint.url}", "--model", "m", "--without-images"]
    for limit, reason in (("1", "answers failed"), ("0.5", "none of the first 3 prompts")):
        done = lever(*world.argv(*words, "--max-failed", limit, "--json", "-"), check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr and "not that word" in done.stderr
    assert not Store.open(world.store).runs()
    assert not list((world.store / "jobs").iterdir())


@pytest.mark.long
def test_failed_answers_are_asked_anew_by_the_same_command(
    world: World, endpoint: Endpoint
) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        return "number 4?" in question and handler.send(422, "no such image")

    endpoint.fault = fault
    job = request(world, endpoint, max_failed=0.5)
    first = generate(job)
    assert first.run is not None and first.report.failed > 0
    assert "asks them anew" in first.notices[0]
    still = generate(job)  # nothing is mended
    assert (still.already, still.run) == (True, first.run)
    assert still.tally.asked == forecast(job).asked > 0
    endpoint.fault = None
    second = generate(job)
    assert second.run is not None and second.run.parents == (first.run.run,)
    assert (second.report.failed, second.report.candidates) == (0, first.report.candidates)
    before = {(r["query_id"], r["candidate"]): r for r in rows(first.run) if not r["eval_failed"]}
    after = {(r["query_id"], r["candidate"]): r for r in rows(second.run)}
    assert before.items() <= {k: v for k, v in after.items() if k in before}.items()
    assert second.tally.asked == forecast(job).asked + still.tally.asked
    third = generate(job)
    assert (third.already, third.run, third.tally.asked) == (True, second.run, 0)
    assert not list((world.store / "jobs").iterdir())


@pytest.mark.long
def test_the_summary_says_what_the_answers_are_like(world: World, endpoint: Endpoint) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        number = int(question.split("?")[0].split()[-1])
        text = {0: "", 1: f"what is number {number}", 2: "Question: who?"}.get(number, "red")
        return handler.answer(text)

    endpoint.fault = fault
    words = [
        "--answerer",
        f"openai:{endpoint.url}",
        "--model",
        "m",
        "--image-root",
        str(world.images),
    ]
    done = lever(*world.argv(*words))
    found = rows(Store.open(world.store).runs()[0])
    total, of = len(found), Counter(r["query_id"] for r in found)
    accuracy = sum(r["score"] for r in found) / total
    red = total - of[0] - of[1] - of[2]
    # the cut at "Question" leaves nothing of the third
    assert done.stdout.splitlines()[-1] == (
        f"accuracy {accuracy:.1%}; empty {(of[0] + of[2]) / total:.1%}, cut 0.0%; "
        f"commonest: red ({red}), what is number 1 ({of[1]})"
    )
    assert f"{(of[1] + of[2]) / total:.1%} of the answers repeat the prompt" in done.stderr
    again = json.loads(lever(*world.argv(*words, "--json", "-")).stdout)
    assert again["already"] and again["accuracy"] == pytest.approx(accuracy)
    assert again["commonest"][0] == ["red", red]


@pytest.mark.long
def test_three_prompts_are_asked_before_all_others(world: World, endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(400, "not that word")
    with pytest.raises(LeverError, match="none of the first 3 prompts") as error:
        generate(request(world, endpoint))
    assert error.value.value == "3 x HTTP 400: not that word" and len(endpoint.seen) == 3
    assert not Store.open(world.store).runs()
    endpoint.fault = None
    whole = generate(request(world, endpoint))
    assert len(endpoint.seen) == 3 + whole.tally.asked  # paid once, and counted


@pytest.mark.long
def test_a_model_of_the_same_name_that_answers_otherwise_is_noticed(
    world: World, endpoint: Endpoint
) -> None:
    for text in ("red", "red", "blue"):
        endpoint.fault = lambda handler, question, attempt, said=text: handler.answer(said)
        notices = generate(request(world, endpoint, seed=len(endpoint.seen))).notices
        odd = [n for n in notices if "stored prompts otherwise" in n]
        assert len(odd) == (text == "blue")
    assert "answers 5 of 5 stored prompts otherwise ('red' is 'blue' now)" in odd[0]
    assert "--scorer NAME" in odd[0]


@pytest.mark.long
def test_the_noise_of_the_answers_is_that_of_asking_again(world: World, endpoint: Endpoint) -> None:
    """Every third prompt is answered otherwise the second time."""
    truth = Counter(a["answer"] for q in json.loads(world.annotations.read_text())["annotations"]
                    for a in q["answers"]).most_common(1)[0][0]  # fmt: skip
    endpoint.fault = lambda handler, question, attempt: handler.answer(truth)
    generate(request(world, endpoint))
    steady = repeat(request(world, endpoint), 200)
    assert (steady.failed, steady.changed, steady.noise) == (0, 0, 0.0)
    (run,) = [r for r in Store.open(world.store).runs() if r.kind == "rollout"]
    assert steady.asked == run.details["report"]["candidates"]
    turn = itertools.count()

    def waver(handler: Handler, question: str, attempt: int) -> bool:
        return handler.answer("nothing like it" if next(turn) % 3 == 0 else truth)

    endpoint.fault = waver
    found = repeat(request(world, endpoint), 200)
    assert 0.2 * found.asked < found.changed < 0.5 * found.asked
    # an answer that was right and is wrong now differs by its whole accuracy
    assert 0 < found.noise <= 0.5
    assert found.within is not None
    before = len(Store.open(world.store).runs())
    told = lever(*world.argv("--repeat-sample", "5"), check=False)
    assert told.returncode == 1 and "no stored answers of this scorer" in told.stderr
    assert len(Store.open(world.store).runs()) == before


def test_a_dry_run_shows_prompts_and_their_answers_word_by_word(world: World) -> None:
    told = lever(*world.argv("--dry-run", "--show", "2")).stdout
    assert told.count("-- prompt ") == told.count("-- answer ") == 2
    assert "Question:what is number 0? Short answer:\n-- answer 1\n" in told
    assert "no answer" not in told
    refused = lever(*world.argv("--show", "2"), check=False)
    assert refused.returncode == 2 and "--show goes with --dry-run" in refused.stderr


def test_a_dry_run_says_why_there_is_no_answer(world: World, endpoint: Endpoint) -> None:
    endpoint.fault = lambda handler, question, attempt: handler.send(422, "no such image")
    told = forecast(request(world, endpoint), show=3)
    assert told.answers == ("no answer: HTTP 422: no such image",) * 3
