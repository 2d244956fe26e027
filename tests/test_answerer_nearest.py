"""The nearest answerer: the rule on small numbers, and the stored predictions of the real data."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lever_data.errors import LeverError
from lever_data.items.items import Truth
from lever_data.items.prompts import Item, Prompt
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task
from lever_data.readers.torch_file import read_torch
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.score import expected_score
from tests.shared_data import OKVQA, needs_shared


def item(number: int, *answers: str) -> Item:
    return Item("d", "s", number, "q?", answers, answers[0] if answers else None)


QUERY = item(0)
VECTORS = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)


def test_the_mixture_weighs_demonstrations_by_similarity() -> None:
    near, far = item(1, "cat", "cat", "dog", "cow"), item(2, "dog", "dog", "dog", "dog")
    answerer = NearestAnswerer(VECTORS, VECTORS)
    (found,) = answerer.answer([Prompt(QUERY, (near, far), ("cat", "dog", "owl"))])
    w = 1 / (1 + math.exp(-1 / 0.05))  # similarities 1 and 0
    assert found.text == "cat"
    assert found.log_probs is not None
    assert [math.exp(p) for p in found.log_probs] == pytest.approx(
        [w * 0.5, w * 0.25 + (1 - w), 0.0], rel=1e-6
    )
    (far_only,) = answerer.answer([Prompt(QUERY, (far,))])
    assert far_only.text == "dog" and far_only.log_probs == ()


def test_ties_go_to_the_later_in_string_order() -> None:
    answerer = NearestAnswerer(VECTORS, VECTORS)
    (found,) = answerer.answer([Prompt(QUERY, (item(1, "b", "z", "a"),))])
    assert found.text == "z"
    (clear,) = answerer.answer([Prompt(QUERY, (item(1, *["b"] * 51, *["c"] * 50),))])
    assert clear.text == "b"
    equal = tuple(["b"] * 1_000_001 + ["c"] * 1_000_000)  # once rounded to six decimals
    (rounded,) = answerer.answer([Prompt(QUERY, (item(1, *equal),))])
    assert rounded.text == "c"


def test_without_demonstrations_the_prior_answers() -> None:
    prior = [("red", "red"), ("blue", "red"), ("green", "blue")]
    answerer = NearestAnswerer(VECTORS, VECTORS, prior)
    (found,) = answerer.answer([Prompt(QUERY, (), ("blue",))])
    assert found.text == "red"
    assert found.log_probs is not None
    assert list(found.log_probs) == [pytest.approx(math.log(2 / 6))]
    (none,) = NearestAnswerer(VECTORS, VECTORS).answer([Prompt(QUERY, ())])
    assert none.text is None and none.error is not None and "no prior" in none.error


def test_an_answer_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 33)).astype(np.float32)
    known = [item(n, *rng.choice(list("abcdef"), 10).tolist()) for n in range(50)]
    prompts = [
        Prompt(known[q], tuple(known[d] for d in rng.choice(50, 3, replace=False)), ("a", "b"))
        for q in range(50)
    ]
    answerer = NearestAnswerer(vectors, vectors)
    together = answerer.answer(prompts)
    assert together == [answerer.answer([p])[0] for p in prompts]
    assert answerer.usage.answers == 100


def test_items_without_vectors_are_named() -> None:
    with pytest.raises(LeverError, match="no row in the embeddings; at example; value 9"):
        NearestAnswerer(VECTORS, VECTORS).answer([Prompt(QUERY, (item(9, "a"),))])
    with pytest.raises(LeverError, match="differ in width"):
        NearestAnswerer(VECTORS, VECTORS[:, :1])


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        ("pony tail", "pony tail"),
        (" dog\n", "dog"),
        ("red Question:what", "red"),
        ("red, blue", "red"),
        ("two Short answer", "two"),
        ("Answer: five", ""),
        ("1,000", "1,000"),
        ("", ""),
    ],
)
def test_generations_are_cut_as_the_legacy_code_cuts_them(generated: str, answer: str) -> None:
    assert Task().answer(generated) == answer


@pytest.mark.long
@needs_shared
def test_stored_predictions_are_reproduced() -> None:
    """All `file` candidates of the real data: at least 99.9 %, the rest ties within rounding."""
    known, answerer = _okvqa()
    stored = _load("rl_data_TextSimSampler_NearestDemo.json.gz")
    prompts, wanted = [], []
    for query, value in stored.items():
        for candidate in value["pointer_candidates"]:
            if candidate["vqa_eval_mode"] == "file":
                shown = tuple(known[e] for e in candidate["pointer"])
                prompts.append(Prompt(known[int(query)], shown))
                wanted.append(candidate["vqa_pred_answer"])
    assert len(prompts) == 86_184
    answers = answerer.answer(prompts)
    other = [
        i for i, a in enumerate(answers) if a.text is None or Task().answer(a.text) != wanted[i]
    ]
    assert len(other) <= 4  # 99.995 %
    for i in other:  # both answers within 2e-6 of each other: the last bit of a dot product
        texts = (answers[i].text or "", wanted[i])
        (again,) = answerer.answer([Prompt(prompts[i].query, prompts[i].demonstrations, texts)])
        assert again.log_probs is not None
        assert abs(math.exp(again.log_probs[0]) - math.exp(again.log_probs[1])) < 3e-6


@pytest.mark.slow
@needs_shared
def test_stored_expected_accuracies_are_reproduced() -> None:
    known, answerer = _okvqa()
    stored = json.loads((OKVQA / "rl_data_v4_strict_400.json").read_bytes())
    checked = 0
    for query, value in stored.items():
        if query.startswith("_"):
            continue
        asked = known[int(query)]
        given = tuple(sorted(Counter(asked.answers)))
        prompts = [
            Prompt(asked, tuple(known[e] for e in c["pointer"]), given)
            for c in value["pointer_candidates"]
        ]
        for answer, candidate in zip(
            answerer.answer(prompts), value["pointer_candidates"], strict=True
        ):
            expected = expected_score(answer, Truth(asked.answers, True, given), Scoring(Task()))
            assert expected == pytest.approx(candidate["vqa_gt_prob"], abs=4e-6)
            checked += 1
    assert checked > 3800


def _load(name: str) -> Any:
    return json.loads(gzip.decompress((OKVQA / name).read_bytes()))


def _okvqa() -> tuple[list[Item], NearestAnswerer]:
    vectors = np.asarray(read_torch(OKVQA / "train_question_embeddings.pt"), dtype=np.float32)
    asked = _load("OpenEnded_mscoco_train2014_questions.json.gz")
    noted = _load("mscoco_train2014_annotations.json.gz")
    said = {
        a["question_id"]: tuple(x["answer"] for x in a["answers"]) for a in noted["annotations"]
    }
    known = [
        Item("okvqa", "train", n, q["question"], said[q["question_id"]], None)
        for n, q in enumerate(asked["questions"])
    ]
    return known, NearestAnswerer(vectors, vectors)
