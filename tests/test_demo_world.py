"""The embedded world: the same for a seed, honest about what it hides, whole on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lever_data.items.vqa_metric import fallback_match, vqa_accuracy
from lever_demo.answers import DemoAnswerer
from lever_demo.files import WorldFiles, write_world
from lever_demo.proposals import BEAMS, propose, score
from lever_demo.world import QUESTIONS, World, WorldSpec, make_world

SMALL = WorldSpec(train=200, held_out=60, pool=12)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL)


@pytest.fixture(scope="module")
def files(world: World, tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_world(world, tmp_path_factory.mktemp("world"))


def _digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes(files: WorldFiles, tmp_path: Path) -> None:
    again = _digest(write_world(make_world(SMALL), tmp_path / "again").folder)
    other = _digest(write_world(make_world(WorldSpec(200, 60, 12, seed=1)), tmp_path / "o").folder)
    assert again == _digest(files.folder)
    assert all(other[name] != again[name] for name in again)


def test_pools_hold_train_items_nearest_first_and_never_the_query(world: World) -> None:
    similarity = world.train.embedding @ world.train.embedding.T
    for query, pool in enumerate(world.train_pool):
        assert query not in pool and len(set(pool.tolist())) == SMALL.pool
        row = similarity[query, pool]
        assert (np.diff(row) <= 1e-6).all()
        outside = np.delete(similarity[query], [*pool, query])
        assert row[-1] >= outside.max() - 1e-6
    assert world.held_out_pool.shape == (60, 12) and world.held_out_pool.max() < 200


def test_answers_follow_from_kind_and_question(world: World) -> None:
    """Most of ten annotators agree, and on the same answer wherever kind and question agree."""
    items = world.train
    truth: dict[tuple[int, int], str] = {}
    for item, said in enumerate(items.answers):
        top = max(set(said), key=said.count)
        assert len(said) == 10 and said.count(top) >= 6
        key = (int(items.kind[item]), int(items.asked[item]))
        assert truth.setdefault(key, top) == top
        assert items.question(item) in QUESTIONS[items.asked[item]]


def test_the_answerer_mixes_what_it_is_shown(world: World) -> None:
    """Against the rule written out for one query."""
    answerer = DemoAnswerer(world.train)
    query, shown = world.held_out.vision[3], world.held_out_pool[3, :3]
    weights = [np.exp(float(query @ world.train.vision[i]) / 0.05) for i in shown]
    mixed: dict[str, float] = {}
    for weight, item in zip(weights, shown, strict=True):
        for word in world.train.answers[item]:
            mixed[word] = mixed.get(word, 0.0) + weight / sum(weights) / 10
    best = max((round(total, 6), word) for word, total in mixed.items())[1]
    found = answerer.answer(world.held_out.vision[3:4], shown[None, None])
    assert found.tolist() == [[best]]


def test_one_demonstration_is_repeated(world: World) -> None:
    shown = world.held_out_pool[:, :1]
    found = DemoAnswerer(world.train).answer(world.held_out.vision, shown[:, None])[:, 0]
    tops = [max(set(a), key=lambda w: (a.count(w), w)) for a in world.train.answers]
    assert found.tolist() == [tops[i] for i in shown[:, 0]]


def test_beams_are_the_most_probable_pairs(world: World) -> None:
    logits = (world.train.embedding[0] @ world.train.embedding[world.train_pool[0]].T) / 0.1
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    pairs = {
        (a, b): float(np.log(p[a]) + np.log(p[b] / (1 - p[a])))
        for a in range(SMALL.pool)
        for b in range(SMALL.pool)
        if a != b
    }
    best = sorted(pairs.values(), reverse=True)[:BEAMS]
    for draw, expected in zip(propose(world)[:BEAMS], best, strict=True):
        assert draw.log_prob is not None
        assert draw.log_prob[0] == pytest.approx(expected, abs=1e-4)
        assert pairs[tuple(draw.positions[0].tolist())] == pytest.approx(expected, abs=1e-4)


def test_scores_are_the_metric_of_the_predictions(world: World) -> None:
    scores = score(world, propose(world))
    official = vqa_accuracy(list(scores.prediction[:, 5]), world.train.answers)
    for query in range(len(world.train)):
        said = world.train.answers[query]
        by_string = fallback_match(str(scores.prediction[query, 5]), said)
        expected = by_string if scores.is_fallback[query, 5] else official[query]
        assert scores.accuracy[query, 5] == expected
    assert 0 < scores.is_fallback.mean() < 0.1
    assert scores.gt_prob.min() >= 0 and scores.gt_prob.max() <= 1


def test_rl_data_on_disk_is_of_the_newest_generation(world: World, files: WorldFiles) -> None:
    data = json.loads(files.rl_data.read_text())
    assert data.pop("_meta")["vqa_model"] == "demo-nearest-demonstration"
    assert list(data) == [str(q) for q in range(200)]
    for query, value in data.items():
        pool = value["candidate_pool_indices"]
        assert pool == world.train_pool[int(query)].tolist()
        pointers = [tuple(c["pointer"]) for c in value["pointer_candidates"]]
        assert len(set(pointers)) == len(pointers) >= BEAMS
        for candidate in value["pointer_candidates"]:
            assert candidate["pointer"] == [pool[i] for i in candidate["pointer_pos"]]
            assert candidate["vqa_correct"] == int(candidate["vqa_acc_score"] > 0)
    assert len(json.loads(files.beam_data.read_text())) == 50
    for split, count in (("train", 200), ("val", 60)):
        questions = json.loads(files.questions(split).read_text())["questions"]
        annotations = json.loads(files.annotations(split).read_text())["annotations"]
        assert [q["question_id"] for q in questions] == [a["question_id"] for a in annotations]
        assert len(questions) == count == len(np.load(files.pool(split)))
