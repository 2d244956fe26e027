"""An evaluation made again: what is shown is what is stored, however it came out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lever_data import connect
from lever_data.store.store import Store
from lever_train.evaluate.api import Evaluation, run_evaluation
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.options.rollout import AnswererSpec
from tests.endpoint import Endpoint, serving
from tests.rollouts import World, add_images, make_world

QUERIES = 14  # a pool of 12, the query, and one more


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path, QUERIES)
    add_images(world)
    Store.create(world.store)
    return world


def _evaluate(world: World, endpoint: Endpoint) -> Evaluation:
    questions = Questions(
        dataset="d",
        split="train",
        candidate_split="train",
        query_embeddings=str(world.embeddings),
        pool=world.pool,
        questions=world.questions,
        annotations=world.annotations,
        image_root=world.images,
    )
    spec = AnswererSpec(spec=f"openai:{endpoint.url}", model="m", patience=5.0)
    contest = Contest(shots=(1,), oracle="no")
    return run_evaluation(
        EvalRequest(store=world.store, questions=questions, contest=contest, answerer=spec)
    )


def _stored(world: World, run: str | None) -> list[tuple[object, ...]]:
    sql = """
        select selector, shots, round(mean_accuracy, 9), num_queries - num_failed, num_failed
        from evaluation_scores where run = ? order by all
    """
    return connect(world.store).execute(sql, [run]).fetchall()


def _shown(found: Evaluation) -> list[tuple[object, ...]]:
    rows = found.scoreboard.rows
    return sorted((r.selector, r.shots, round(r.accuracy, 9), r.n, r.failed) for r in rows)


@pytest.mark.long
def test_answers_that_come_the_second_time_are_a_run_of_their_own(
    world: World, endpoint: Endpoint
) -> None:
    endpoint.fault = lambda handler, question, attempt: (
        len(question) % 2 == 0 and handler.send(400, "not this one")
    )
    first = _evaluate(world, endpoint)
    again = _evaluate(world, endpoint)
    assert not again.is_new and again.scoreboard == first.scoreboard
    endpoint.fault = lambda handler, question, attempt: handler.answer("red")
    whole = _evaluate(world, endpoint)
    assert first.scoreboard.rows[0].failed > 0 == whole.scoreboard.rows[0].failed
    assert whole.is_new and whole.scoreboard.run != first.scoreboard.run
    for found in (first, whole):
        assert _stored(world, found.scoreboard.run) == _shown(found)
    assert not _evaluate(world, endpoint).is_new


@pytest.mark.long
def test_another_image_is_another_evaluation_whatever_is_answered(
    world: World, endpoint: Endpoint
) -> None:
    first = _evaluate(world, endpoint)
    with next(world.images.rglob("*.*")).open("ab") as image:
        image.write(b"!")
    other = _evaluate(world, endpoint)
    assert other.is_new and _shown(other) == _shown(first)
