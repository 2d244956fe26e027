"""`lever beam`: InfoScore against a plain search, and rows that supervised training can read."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lever_cli.__main__ import main

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.store import Store
from lever_train.options.rollout import BeamShape
from lever_train.rollout.infoscore import FLOOR, search_beams
from tests.cases import long
from tests.endpoint import Handler, serving
from tests.rollouts import World, make_world, rows

TEXT = json.dumps({"choices": [{"text": "x", "finish_reason": "length"}]})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, queries=24)


class Plain:
    """The search written out: a dictionary of probabilities per prompt, one query at a time."""

    def __init__(self, world: World) -> None:
        noted = json.loads(world.annotations.read_text())["annotations"]
        self.answers = [[x["answer"] for x in a["answers"]] for a in noted]
        self.vectors = np.load(world.embeddings)
        self.pool = np.load(world.pool).tolist()
        self.prior = Counter(a for answers in self.answers for a in answers)

    def log_truth(self, query: int, shown: tuple[int, ...]) -> float:
        mixture: Counter[str] = Counter()
        if not shown:
            total = self.prior.total()
            mixture.update({a: n / total for a, n in self.prior.items()})
        similarity = self.vectors[list(shown)] @ self.vectors[query] if shown else np.zeros(0)
        weights = np.exp(similarity.astype(float) / 0.05)
        for e, w in zip(shown, weights / max(weights.sum(), 1e-300), strict=True):
            for a, n in Counter(self.answers[e]).items():
                mixture[a] += w * n / 10
        truth = Counter(self.answers[query])
        return math.log(max(sum(mixture[a] * min(n / 3, 1) for a, n in truth.items()), FLOOR))

    def legacy_beams(self, query: int, shots: int, size: int) -> list[float]:
        """P(truth | e, D) - P(truth | D) of the last step, sequences grown leftwards."""

        def gain(s: tuple[int, ...]) -> float:
            return math.exp(self.log_truth(query, s)) - math.exp(self.log_truth(query, s[1:]))

        kept: list[tuple[int, ...]] = [()]
        for _ in range(shots):
            grown = [(e, *s) for s in kept for e in self.pool[query] if e not in s]
            kept = sorted(grown, key=lambda s: -gain(s))[:size]
        return [gain(s) for s in kept]

    def beams(self, query: int, shots: int, size: int) -> list[float]:
        """info(D) of the kept sequences, best first."""
        kept: list[tuple[int, ...]] = [()]
        for _ in range(shots):
            grown = [(*s, e) for s in kept for e in self.pool[query] if e not in s]
            kept = sorted(grown, key=lambda s: -self.log_truth(query, s))[:size]
        return [self.log_truth(query, s) - self.log_truth(query, ()) for s in kept]


@pytest.mark.slow
@pytest.mark.parametrize("shots", [long(1), 2])
def test_beams_are_those_of_a_plain_search(world: World, shots: int) -> None:
    outcome = search_beams(world.request(shot_num=shots, num_beams=3))
    found = rows(outcome.run)
    plain = Plain(world)
    assert outcome.report.candidates == len(found) == 3 * world.queries
    for query in range(world.queries):
        mine = [r for r in found if r["query_id"] == query]
        assert [r["beam_rank"] for r in mine] == [0, 1, 2]
        assert [r["info_score"] for r in mine] == pytest.approx(
            plain.beams(query, shots, 3), abs=2e-4
        )
        for row in mine:
            expected = plain.log_truth(query, tuple(row["pointer"])) - plain.log_truth(query, ())
            assert row["info_score"] == pytest.approx(expected, abs=2e-4)
            assert len(set(row["pointer"])) == shots and query not in row["pointer"]
            assert row["scorer"] == "nearest" and row["score"] is None


@pytest.mark.slow
def test_the_legacy_definition_is_the_last_step_leftwards(world: World) -> None:
    request = world.request(shot_num=2)
    ours = search_beams(request.but(recipe=BeamShape(beam_size=3).recipe()))
    legacy = BeamShape(beam_size=3, info_score="legacy")
    outcome = search_beams(request.but(recipe=legacy.recipe()))
    assert outcome.run is not None and outcome.run != ours.run
    found, plain = rows(outcome.run), Plain(world)
    for query in range(world.queries):
        scores = [r["info_score"] for r in found if r["query_id"] == query]
        assert scores == pytest.approx(plain.legacy_beams(query, 2, 3), abs=1e-4)
    assert json.loads(found[0]["extra"])["info_score"] == "legacy"


@pytest.mark.long
def test_beams_are_for_supervised_training_and_nothing_else(world: World) -> None:
    run = search_beams(world.request()).run
    assert run is not None and run.kind == "beam"
    con = connect(world.store)
    counts = con.execute(
        "select (select count(*) from beam_infoscore), (select count(*) from all_candidates)"
    ).fetchall()
    assert counts == [(5 * world.queries, 0)]


@pytest.mark.long
def test_the_search_is_durable_and_cached(world: World) -> None:
    first = search_beams(world.request(shard_size=5))
    assert search_beams(world.request(shard_size=7)).already
    assert first.run is not None
    Store.open(world.store).remove(first.run.run)
    again = search_beams(world.request(shard_size=7))
    assert again.tally.asked == 0
    assert again.run is not None and again.run.files == first.run.files


def test_an_answerer_without_probabilities_is_refused(world: World) -> None:
    with serving() as endpoint:
        request = world.request(
            spec=f"openai:{endpoint.url}", model="m", api="completions", limit=2
        )
        with pytest.raises(LeverError, match="gives no log-probabilities of a prompt"):
            search_beams(request)


@pytest.mark.long
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_beams_of_an_endpoint_that_knows_probabilities(world: World, api: str) -> None:
    """Of what is shown (`echo`, as llama.cpp), or of the last turn (`prompt_logprobs`, as vLLM)."""

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        body = endpoint.seen[-1]
        if "prompt_logprobs" in body:
            return handler.prompt_logprobs(body["messages"][-1]["content"])
        if "echo" in body:
            return handler.echo(body["prompt"])
        return handler.answer("x") if api == "chat" else handler.send(200, TEXT)

    with serving() as endpoint:
        endpoint.fault = fault
        found = search_beams(
            world.request(
                spec=f"openai:{endpoint.url}",
                model="m",
                api=api,
                images=False,
                concurrency=1,  # the last request seen is the one answered
                limit=1,
                num_beams=2,
                shot_num=1,
            )
        )
    beams = rows(found.run)
    assert len(beams) == 2 and found.report.failed == 0
    assert all(math.isfinite(row["info_score"]) for row in beams)
    # what is shown before the answer moves its place in a text, and no probability of a turn
    assert any(row["info_score"] for row in beams) == (api == "completions")


@pytest.mark.slow
def test_the_command(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["beam", *world.argv()[1:], "--limit", "4", "--beam-size", "2"]
    for head in ("searched", "already searched as"):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        shown = capfd.readouterr().out
        assert shown.startswith(f"{head} beam-d-train-") and "8 beams of 4 queries" in shown
