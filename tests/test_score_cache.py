"""The answer cache: exact, safe beside other writers, bounded, and never wrong in silence."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt
from lever_train.rollout import cache as module
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.ask import Asker, scope, shared_beginnings, shown_first
from lever_train.rollout.cache import FANOUT, AnswerCache, open_cache


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def answer(number: int) -> Answer:
    probabilities = None if number % 3 == 0 else (-float(number), float("-inf"))
    return Answer(f"answer {number}\n", probabilities)


def fill(folder: Path, numbers: range, flush_every: int = 10) -> None:
    cache = AnswerCache(folder)
    for count, number in enumerate(numbers, 1):
        cache.put(key(number), answer(number))
        if count % flush_every == 0:
            cache.flush()
    cache.flush()


def test_what_was_put_is_found_by_another_process(tmp_path: Path) -> None:
    fill(tmp_path / "c", range(100))
    found = AnswerCache(tmp_path / "c").get([key(n) for n in range(-5, 105)])
    assert found == [None] * 5 + [answer(n) for n in range(100)] + [None] * 5


def test_what_is_not_flushed_is_found_by_its_own_process(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c")
    cache.put(key(1), answer(1))
    assert cache.get([key(1), key(2)]) == [answer(1), None]
    assert not (tmp_path / "c").exists()


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c")
    cache.put(key(1), Answer(None, error="timeout"))
    cache.flush()
    assert cache.get([key(1)]) == [None]


@pytest.mark.long
def test_segments_are_merged_and_nothing_is_lost(tmp_path: Path) -> None:
    count = FANOUT * FANOUT * 2 + 3
    fill(tmp_path / "c", range(count), flush_every=1)
    segments = [p.name for p in (tmp_path / "c").glob("seg-*")]
    assert len(segments) < 3 * FANOUT
    assert {name.split("-")[1] for name in segments} == {"0", "2"}
    assert AnswerCache(tmp_path / "c").get([key(n) for n in range(count)]) == [
        answer(n) for n in range(count)
    ]


def test_a_reader_survives_a_merge_of_others(tmp_path: Path) -> None:
    fill(tmp_path / "c", range(FANOUT - 1), flush_every=1)
    reader = AnswerCache(tmp_path / "c")
    assert reader.get([key(3)]) == [answer(3)]
    fill(tmp_path / "c", range(FANOUT, FANOUT + 2), flush_every=1)  # merges what it mapped
    wanted = [0, 3, FANOUT, FANOUT + 1]
    assert reader.get([key(n) for n in wanted]) == [answer(n) for n in wanted]


@pytest.mark.long
def test_writers_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    parts = [range(300), range(200, 500), range(400, 700)]
    workers = [context.Process(target=fill, args=(tmp_path / "c", p, 3)) for p in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = AnswerCache(tmp_path / "c").get([key(n) for n in range(700)])
    assert found == [answer(n) for n in range(700)]


def test_keys_that_share_64_bits_are_told_apart(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c")
    keys = [b"\xff" * 8 + bytes([n]) * 24 for n in (9, 3, 7)]
    for n, k in enumerate(keys):
        cache.put(k, answer(n))
    cache.flush()
    missing = b"\xff" * 8 + bytes(24)
    assert cache.get([*keys, missing]) == [answer(0), answer(1), answer(2), None]


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "c", range(50), flush_every=50)
    (path,) = (tmp_path / "c").glob("seg-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LeverError, match="segment of the answer cache is damaged") as error:
        AnswerCache(tmp_path / "c").get([key(1)])
    assert str(path) in str(error.value)
    path.unlink()  # what the hint says
    assert AnswerCache(tmp_path / "c").get([key(1)]) == [None]


def test_a_crash_leaves_at_most_a_temporary_file(tmp_path: Path) -> None:
    fill(tmp_path / "c", range(20))
    (tmp_path / "c" / ".seg-0-abc.arrow.1234").write_bytes(b"half a segm")
    assert AnswerCache(tmp_path / "c").get([key(7)]) == [answer(7)]


def test_answers_are_flushed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    cache = AnswerCache(tmp_path / "c")
    cache.put(key(1), answer(1))
    cache.flush_if_due()
    assert AnswerCache(tmp_path / "c").get([key(1)]) == [answer(1)]


def items(count: int, answers: tuple[str, ...] = ("a", "b")) -> list[Item]:
    return [Item("d", "s", n, f"q{n}?", answers, answers[0]) for n in range(count)]


def asker(tmp_path: Path, vectors: np.ndarray) -> Asker:
    answerer = NearestAnswerer(vectors, vectors)
    return Asker(answerer, open_cache(tmp_path, scope(answerer)))


def test_the_key_holds_all_that_an_answer_depends_on(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    q, a, b, c = items(4)
    base = asker(tmp_path, vectors)
    known = base.key(Prompt(q, (a, b), ("a",)))
    again = items(4)
    assert known == base.key(Prompt(again[0], (again[1], again[2]), ("a",)))  # by content
    others = [
        base.key(Prompt(q, (b, a), ("a",))),  # order matters to a model
        base.key(Prompt(q, (a,), ("a",))),
        base.key(Prompt(q, (a, c), ("a",))),
        base.key(Prompt(c, (a, b), ("a",))),
        base.key(Prompt(q, (a, b), ("a", "b"))),  # other probabilities are wanted
        base.key(Prompt(q, (a, items(4, ("z",))[2]), ("a",))),  # the demonstration says otherwise
        asker(tmp_path, vectors * 2).key(Prompt(q, (a, b), ("a",))),  # another embedding
    ]
    assert len({known, *others}) == 8


def test_another_scope_misses_and_the_same_question_hits(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    q, a, b, _ = items(4)
    prompts = [Prompt(q, (a, b)), Prompt(q, (b, a)), Prompt(q, (a, b))]
    first = asker(tmp_path, vectors)
    answers = first.ask(prompts)
    assert (first.tally.asked, first.tally.hits) == (2, 1)
    second = asker(tmp_path, vectors)
    assert second.ask(prompts) == answers
    assert (second.tally.asked, second.tally.hits) == (0, 3)
    other = NearestAnswerer(vectors, vectors, prior=[("x",)])  # other generation parameters
    third = Asker(other, open_cache(tmp_path, scope(other)))
    assert third.missing(prompts) == 2


def test_prompts_that_begin_alike_are_neighbours() -> None:
    items = [Item("d", "s", n, f"q{n}", ("a",), "a") for n in range(4)]
    pointers = [(2, 1), (0,), (2,), (0, 3), (2, 1)]
    prompts = [Prompt(items[3], tuple(items[i] for i in pointer)) for pointer in pointers]
    sent = [shown_first(p) for p in sorted(prompts, key=shown_first)]
    assert sent == [(0,), (0, 3), (2,), (2, 1), (2, 1)]
    assert shared_beginnings(["abcd", "abxy", "abxy"]) == 6 / 12
    assert shared_beginnings([]) == 0


def test_prompts_are_asked_in_that_order(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)
    asked: list[Prompt] = []

    class Listening(NearestAnswerer):
        def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
            asked.extend(prompts)
            return super().answer(prompts)

    items = [Item("d", "s", n, f"q{n}", ("a",), "a") for n in range(8)]
    prompts = [Prompt(items[q], (items[q % 2], items[q])) for q in range(8)]
    answerer = Listening(vectors, vectors)
    found = Asker(answerer, open_cache(tmp_path, scope(answerer))).ask(prompts)
    assert [p.demonstrations[0].example_id for p in asked] == [0] * 4 + [1] * 4
    assert [answer.text for _, answer in found] == ["a"] * 8  # in the order they were given
