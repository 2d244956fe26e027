"""The official VQA accuracy, and the measures beside it: token F1, edit similarity, string match.

In go predictions and the annotators' answers as plain strings; out come float64 numbers in
[0, 1], one per prediction. No model, no files, no randomness. The rules are those of the VQA
evaluation (Antol et al. 2015, "VQA: Visual Question Answering", and its published evaluation
tools), quirks included: see :func:`normalize_answer`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import Indel

METRIC_VERSION = "vqa-accuracy-2"  # 2: the edit similarity of the legacy code

MATCHES_NEEDED = 3  # other annotators who must agree for full accuracy
_CACHE = 1 << 18  # distinct strings kept: some 60 MB at the length of VQA answers

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

# What the tools restore an apostrophe in. A form with one apostrophe is found without it, a form
# with more is found with any one of them missing. (The tools also list forms of "I'm", "I've"
# and "I'd've" with a capital I, which no word has after lower-casing.)
_ONE_APOSTROPHE = """
'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
how'd how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
'ow's'at couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll
you'd've
"""
_CONTRACTIONS = {
    **{form.replace("'", ""): form for form in _ONE_APOSTROPHE.split()},
    **{
        form[:at] + form[at + 1 :]: form
        for form in _MORE_APOSTROPHES.split()
        for at, letter in enumerate(form)
        if letter == "'"
    },
    "somebody'd": "somebodyd",  # the tools' own slip: it takes the apostrophe out
}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_HAS_SPECIAL = re.compile("[" + re.escape(_PUNCTUATION) + ".]")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the tools pass the flag re.UNICODE (32) where the count of replacements goes


@lru_cache(maxsize=_CACHE)
def normalize_answer(answer: str) -> str:
    """An answer as the official metric compares it.

    Line breaks and tabs become spaces; a punctuation mark is removed where it touches a space
    anywhere in the text (or where the text has a comma between digits), else it becomes a space;
    periods not followed by a digit go; then lower case, articles out, the words for 0–10 as
    digits ("none" is 0), apostrophes back into contractions, single spaces.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    if _HAS_SPECIAL.search(text):
        text = _without_punctuation(text)
    numbered = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def vqa_accuracy(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Official accuracy of each prediction against the answers to its question.

    The mean over the n annotators of min(1, matches among the other n − 1 / 3), rounded as the
    tools do to two decimals in percent, as a fraction.

    Args:
        predictions: N strings; an empty one matches an empty annotation, as in the tools.
        answers: N lists of the annotators' answers (ten as a rule); lists that occur again cost
            almost nothing.

    Returns:
        float64 [N] in [0, 1].

    Raises:
        ValueError: the lengths differ, or a question has no answers.
    """
    scores = (
        _accuracies(tuple(known)).get(normalize_answer(prediction), 0.0)
        for prediction, known in zip(predictions, answers, strict=True)
    )
    return np.fromiter(scores, np.float64, len(predictions))


def few_annotators(few: int, all_of_them: int, what: str = "questions") -> str:
    """What to say of questions with one to three annotators: too few others can agree."""
    return (
        f"{few:,} of {all_of_them:,} {what} have one to three annotators, to which no answer can "
        "be fully right: the official accuracy is at most 0, 0.33 or 0.67 with one, two or three; "
        "a metric such as exact match or token F1 suits such data"
    )


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """Largest F1 of the words shared with one of ``answers``, both sides normalised; in [0, 1].

    Words count as often as they occur (the F1 of the SQuAD evaluation, Rajpurkar et al. 2016).
    No words on either side give 0.
    """
    words = Counter(normalize_answer(prediction).split())
    return max((_f1(words, Counter(a.split())) for a in _normalized(answers)), default=0.0)


def edit_similarity(prediction: str, answers: Iterable[str]) -> float:
    """Largest 2·M / (length + length) with one of ``answers``, both sides normalised; in [0, 1].

    M counts the characters in matching blocks: the longest common substring, then those to its
    left and right in turn (Ratcliff and Obershelp 1988), as Python's ``difflib`` finds them and
    the legacy code did. An empty prediction gives 0.
    """
    text = normalize_answer(prediction)
    if not text:
        return 0.0
    best = 0.0
    # blocks in order are a common subsequence, so that similarity by the longest one bounds theirs
    bounds = {answer: Indel.normalized_similarity(text, answer) for answer in _normalized(answers)}
    for answer, bound in sorted(bounds.items(), key=lambda pair: -pair[1]):
        if bound <= best:
            break
        best = max(best, SequenceMatcher(None, text, answer).ratio())
    return best


def fallback_match(prediction: str, answers: Iterable[str]) -> float:
    """Accuracy by string match, for want of the official one: 1.0, 0.5 or 0.0.

    1.0 where the prediction equals an answer (lower case, stripped), 0.5 where one contains the
    other. An empty prediction or answer never matches, though "" is in every string.
    """
    text = prediction.strip().lower()
    known = {cleaned for answer in answers if (cleaned := answer.strip().lower())}
    if not text or not known:
        return 0.0
    if text in known:
        return 1.0
    return 0.5 if any(text in answer or answer in text for answer in known) else 0.0


@lru_cache(maxsize=1 << 16)
def _accuracies(answers: tuple[str, ...]) -> dict[str, float]:
    """The accuracy of every normalised string that scores above 0 on one question."""
    if not answers:
        raise ValueError("a question without answers has no accuracy")
    counts = Counter(map(normalize_answer, answers))
    return {answer: _accuracy(count, len(answers)) for answer, count in counts.items()}


@lru_cache(maxsize=1 << 10)
def _accuracy(matches: int, annotators: int) -> float:
    """Those who gave the answer see one match fewer among the others than the rest see."""
    inside = min(1.0, (matches - 1) / MATCHES_NEEDED)
    outside = min(1.0, matches / MATCHES_NEEDED)
    mean = (matches * inside + (annotators - matches) * outside) / annotators
    return round(100 * mean, 2) / 100


def _without_punctuation(text: str) -> str:
    removes_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        if mark in text:
            touches_space = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if removes_all or touches_space else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def _normalized(answers: Iterable[str]) -> set[str]:
    return {normalize_answer(answer) for answer in answers}


def _f1(left: Counter[str], right: Counter[str]) -> float:
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0
