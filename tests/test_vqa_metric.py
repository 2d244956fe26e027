"""The VQA metric: golden accuracies, the official rules and quirks, string match, similarities."""

from __future__ import annotations

import gzip
import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from lever_data.items.vqa_metric import (
    METRIC_VERSION,
    edit_similarity,
    fallback_match,
    normalize_answer,
    token_f1,
    vqa_accuracy,
)
from tests.shared_data import GOLDEN, OKVQA, needs_shared

words = st.text(alphabet="ab ", max_size=4)


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    with gzip.open(path) as handle:
        return cast(dict[str, list[dict[str, Any]]], json.load(handle))


def golden_predictions() -> tuple[list[str], list[list[str]], np.ndarray]:
    """The 5,046 predictions, the answers to their questions, and the percent they score."""
    annotations = read(OKVQA / "mscoco_val2014_annotations.json.gz")["annotations"]
    known = {a["question_id"]: [x["answer"] for x in a["answers"]] for a in annotations}
    results = read(GOLDEN / "vqa_accuracy_okvqa_val.json.gz")["results"]
    percent = np.array([row["accuracy"] for row in results])
    answers = [known[row["question_id"]] for row in results]
    return [row["answer"] for row in results], answers, percent


def naive_accuracy(prediction: str, answers: list[str]) -> float:
    """The metric as the paper states it: for every annotator, the matches among the others."""
    given = normalize_answer(prediction)
    known = [normalize_answer(answer) for answer in answers]
    scores = []
    for annotator in range(len(known)):
        others = known[:annotator] + known[annotator + 1 :]
        scores.append(min(1.0, others.count(given) / 3))
    return round(100 * sum(scores) / len(scores), 2) / 100


@pytest.mark.slow
@needs_shared
def test_equals_the_official_tools_on_every_golden_prediction() -> None:
    predictions, answers, percent = golden_predictions()
    scores = vqa_accuracy(predictions, answers)
    assert len(scores) == 5046
    np.testing.assert_array_equal(scores, percent / 100)
    assert round(100 * float(scores.mean()), 2) == 48.48


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("A dog", "dog"),
        ("the\tRED\ncar ", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("y'alldve", "y'alldve"),  # two apostrophes missing: not restored
        ("somebody'd", "somebodyd"),  # the tools' own slip
        ("lets", "lets"),
        ("im", "im"),  # listed with a capital I, which lower-casing never leaves
        ("black-white", "black white"),
        ("black -white", "black white"),
        ("black- and-white", "black andwhite"),  # one touching mark removes them all
        ("1,000", "1000"),
        ("1,000/day", "1000day"),  # a comma between digits removes every mark
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("." * 40 + "x", "." * 8 + "x"),  # 32 replacements, then the tools stop
        ("  ", ""),
        ("ein café", "ein café"),
    ],
)
def test_normalisation(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_ten_annotators(matches: int, accuracy: float) -> None:
    answers = ["yes"] * matches + [f"no{i}" for i in range(10 - matches)]
    assert vqa_accuracy(["Yes!"], [answers])[0] == accuracy


@pytest.mark.slow
@given(words, st.lists(words, min_size=1, max_size=12))
def test_agrees_with_the_definition(prediction: str, answers: list[str]) -> None:
    assert vqa_accuracy([prediction], [answers])[0] == naive_accuracy(prediction, answers)


def test_one_list_per_prediction() -> None:
    with pytest.raises(ValueError, match="shorter"):
        vqa_accuracy(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy(["a"], [[]])
    assert vqa_accuracy([], []).shape == (0,)


def test_token_f1_takes_the_nearest_answer() -> None:
    assert token_f1("a red car", ["blue bus", "red truck"]) == pytest.approx(0.5)
    assert token_f1("red red car", ["red car"]) == pytest.approx(0.8)
    assert token_f1("", ["", "red"]) == 0.0
    assert token_f1("red", []) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers"),
    [
        ("cream cat", ["cat station", "dog"]),
        ("ice private", ["hot table"]),
        ("station train", ["jet cream", "jet"]),
    ],
)
def test_edit_similarity_is_that_of_matching_blocks(prediction: str, answers: list[str]) -> None:
    """As the legacy code had it; by the longest common subsequence these are higher."""
    sides = [(normalize_answer(prediction), normalize_answer(a)) for a in answers]
    expected = max(SequenceMatcher(None, *pair).ratio() for pair in sides)
    assert edit_similarity(prediction, answers) == expected
    assert expected < max(Indel.normalized_similarity(*pair) for pair in sides)


def test_edit_similarity_takes_the_nearest_answer() -> None:
    assert edit_similarity("the Cat", ["cats", "dog"]) == pytest.approx(6 / 7)
    assert edit_similarity("cat", ["cat"]) == 1.0
    assert edit_similarity("", [""]) == 0.0
    assert edit_similarity("cat", []) == 0.0


@given(words, st.lists(words, max_size=4))
def test_similarities_are_fractions_and_1_on_equality(text: str, answers: list[str]) -> None:
    for measure in (token_f1, edit_similarity):
        assert 0.0 <= measure(text, answers) <= 1.0
        assert measure(text, [*answers, text]) == (1.0 if normalize_answer(text) else 0.0)


def test_fallback_match() -> None:
    assert fallback_match(" Dog ", ["cat", "dog"]) == 1.0
    assert fallback_match("dogs", ["cat", "dog"]) == 0.5
    assert fallback_match("do", ["cat", "dog"]) == 0.5
    assert fallback_match("bird", ["cat", "dog"]) == 0.0


@pytest.mark.parametrize("prediction", ["", "  ", "\n"])
def test_an_empty_prediction_never_matches(prediction: str) -> None:
    """The legacy matcher scored it 0.5, since "" is in every string."""
    assert fallback_match(prediction, ["dog", ""]) == 0.0


def test_an_empty_answer_is_matched_by_nothing() -> None:
    assert fallback_match("dog", ["", "cat"]) == 0.0


def test_the_version_names_the_metric() -> None:
    assert METRIC_VERSION == "vqa-accuracy-2"
