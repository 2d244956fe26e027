"""What a model looks at: an image of every item, under any name, or none at all; each command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_data.errors import UsageError
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_train.embed.embed import embed
from lever_train.evaluate.api import run_evaluation
from lever_train.options.embed import EmbedRequest
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.generate import forecast, generate
from lever_train.rollout.resolve import resolve
from tests.encoders import tiny_clip
from tests.endpoint import Endpoint, Handler, serving
from tests.rollouts import World, add_images, make_world, rows


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Its images are named as no file says: ``pic_7.jpg``."""
    found = make_world(tmp_path, queries=16)
    add_images(found)
    for path in found.images.iterdir():
        path.rename(found.images / f"pic_{int(path.stem[-12:])}.jpg")
    files = [found.questions, found.annotations]
    list(ingest(files, Store.create(found.store), IngestOptions(dataset="d", split="train")))
    return found


def spec(endpoint: Endpoint, **more: Any) -> dict[str, Any]:
    return {"spec": f"openai:{endpoint.url}", "model": "m", "max_failed": 1.0, "limit": 3, **more}


def _evaluation(world: World, answerer: AnswererSpec, **more: Any) -> EvalRequest:
    questions = Questions(
        dataset="d",
        split="train",
        query_embeddings=str(world.embeddings),
        pool=world.pool,
        **more,
    )
    contest = Contest(shots=(1,), limit=3)
    return EvalRequest(store=world.store, questions=questions, contest=contest, answerer=answerer)


@pytest.mark.long
def test_images_have_any_name_in_every_command(
    world: World, endpoint: Endpoint, tmp_path: Path
) -> None:
    named: dict[str, Any] = {"image_root": world.images, "image_name": "pic_{image_id}.jpg"}
    assert generate(world.request(**spec(endpoint), **named)).report.failed == 0
    job = resolve(world.request(**spec(endpoint), **named), "beam")
    assert all(item.image and item.image.exists() for item in job.examples.values())
    asked = AnswererSpec(spec=f"openai:{endpoint.url}", model="m")
    found = run_evaluation(_evaluation(world, asked, **named))
    assert all(row.failed == 0 for row in found.scoreboard.rows)
    assert all(len(_images(body)) > 0 for body in endpoint.seen)
    tiny_clip(tmp_path / "clip")
    request = EmbedRequest(
        store=world.store, encoder=str(tmp_path / "clip"), features="image", **named
    )
    assert not embed(request).failed


@pytest.mark.long
def test_an_image_task_goes_without_images_where_that_is_said(
    world: World, endpoint: Endpoint
) -> None:
    with pytest.raises(UsageError, match="looks at images") as error:
        resolve(world.request(**spec(endpoint)))
    assert "--without-images" in str(error.value.hint)
    outcome = generate(world.request(**spec(endpoint, images=False)))
    asked = AnswererSpec(spec=f"openai:{endpoint.url}", model="m", images=False)
    run_evaluation(_evaluation(world, asked))
    assert endpoint.seen and not any(_images(body) for body in endpoint.seen)
    # a folder that is named all the same is not looked at: nothing is asked anew
    seeing = world.request(**spec(endpoint, images=False), image_root=world.images)
    assert generate(seeing).already
    # and the scores are another scorer's than those of the model that looks
    named: dict[str, Any] = {"image_root": world.images, "image_name": "pic_{image_id}.jpg"}
    looking = resolve(world.request(**spec(endpoint), **named))
    assert looking.label.scorer != rows(outcome.run)[0]["scorer"]


def _images(body: dict[str, Any]) -> list[Any]:
    contents = [m["content"] for m in body["messages"]]
    parts = [p for content in contents if isinstance(content, list) for p in content]
    return [p for p in parts if p["type"] == "image_url"]


def test_where_an_answer_is_cut() -> None:
    said = "red, blue Question: why"

    def cut(*cut_at: str) -> Task:
        return Task(cut_at=cut_at)

    assert Task().answer(said) == "red"
    assert cut("Question").answer(said) == "red, blue"
    assert cut("").answer(said) == said
    assert Task().answer(" no cut ") == "no cut"
    tasks = [Task(), cut("Question"), cut(""), cut("Question", "Answer")]
    assert len({Scoring(task).scorer("m") for task in tasks}) == 4
    assert Scoring(Task()).scorer("m") == "m"


@pytest.mark.long
def test_answers_cut_elsewhere_are_another_scorers_and_not_asked_anew(
    world: World, endpoint: Endpoint
) -> None:
    def fault(handler: Handler, question: str, attempt: int) -> bool:
        return handler.answer("red, blue")

    endpoint.fault = fault
    first = generate(world.request(**spec(endpoint, images=False)))
    asked = len(endpoint.seen)
    whole = world.request(**spec(endpoint, images=False, cut_at=("Question",)))
    assert forecast(whole).asked == 0
    second = generate(whole)
    assert len(endpoint.seen) == asked
    assert {r["answer"] for r in rows(first.run)} == {"red"}
    assert {r["answer"] for r in rows(second.run)} == {"red, blue"}
    assert {r["scorer"] for r in rows(first.run)}.isdisjoint(r["scorer"] for r in rows(second.run))
    answerer = AnswererSpec(
        spec=f"openai:{endpoint.url}", model="m", images=False, cut_at=("Question",)
    )
    found = run_evaluation(_evaluation(world, answerer))
    assert {p for o in found.outcomes for p in o.predictions} == {"red, blue"}
    assert np.isfinite([row.accuracy for row in found.scoreboard.rows]).all()
