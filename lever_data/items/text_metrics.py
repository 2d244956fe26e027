"""Metrics of text beside the VQA accuracy: SQuAD, labels, CIDEr-D, ROUGE-L.

In go predictions and the references of each; out come float64 numbers in [0, 1], one per
prediction. No model, no files, no randomness.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from rapidfuzz.distance import LCSseq

References = Sequence[Sequence[str]]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTER = re.compile(r"\(?([a-z0-9])(?:[).:]|$)(?!\w)")
_BULLET = re.compile(r"[-*•]\s+")
# around a label, and no part of it: "-1" is another label than "1", "C++" than "C"
_AROUND = ".,;:!?\"'`()[]{}*_ "


@lru_cache(maxsize=1 << 18)
def normalize_squad(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: the rules of the SQuAD
    evaluation (Rajpurkar et al. 2016)."""
    words = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))
    return " ".join(words.split())


def squad_exact(predictions: Sequence[str], references: References) -> list[float]:
    """1.0 where a prediction equals one of its references, both normalised."""
    return [
        float(normalize_squad(said) in {normalize_squad(r) for r in known})
        for said, known in zip(predictions, references, strict=True)
    ]


def squad_f1(predictions: Sequence[str], references: References) -> list[float]:
    """Largest F1 of the words shared with a reference, both normalised; where one of the two has
    no words, whether they are equal (SQuAD 2.0)."""
    return [
        max((_token_f1(normalize_squad(said), normalize_squad(r)) for r in known), default=0.0)
        for said, known in zip(predictions, references, strict=True)
    ]


def label_match(predictions: Sequence[str], references: References) -> list[float]:
    """1.0 where a prediction is one of its labels, in any case and without quotes, brackets and
    marks of a sentence around it, or begins with the letter or digit of a choice (``B``, ``(b)``,
    ``B. blue``). Signs belong to a label: ``-1``, ``+``, ``C++``."""
    return [
        float(_is_label(said, {_bare(r) for r in known}))
        for said, known in zip(predictions, references, strict=True)
    ]


def rouge_l(predictions: Sequence[str], references: References) -> list[float]:
    """ROUGE-L (Lin 2004) as the COCO caption evaluation computes it: F of the longest common
    subsequence of words with β = 1.2, precision and recall each the best over the references."""
    return [
        _rouge(_words(said), [_words(r) for r in known])
        for said, known in zip(predictions, references, strict=True)
    ]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) as the COCO caption evaluation computes it, divided by its
    largest value 10 and at most 1. Words are lower case without punctuation.

    Args:
        corpus: the references of every item of the split: how rare an n-gram is.
    """

    def __init__(self, corpus: Iterable[Sequence[str]]) -> None:
        self._num_items = 0
        self._items_with: Counter[tuple[str, ...]] = Counter()
        for references in corpus:
            self._num_items += 1
            self._items_with.update({gram for text in references for gram in _grams(text)})

    def __call__(self, predictions: Sequence[str], references: References) -> list[float]:
        """The score of each prediction."""
        return [
            min(1.0, self._one(said, known)) if known else 0.0
            for said, known in zip(predictions, references, strict=True)
        ]

    def _one(self, said: str, known: Sequence[str]) -> float:
        vector, norms, length = self._weights(said)
        total = 0.0
        for text in known:
            other, other_norms, other_length = self._weights(text)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for n in range(_LONGEST):
                both = vector[n].keys() & other[n].keys()
                shared = sum(min(vector[n][g], other[n][g]) * other[n][g] for g in sorted(both))
                if norms[n] and other_norms[n]:
                    total += penalty * shared / (norms[n] * other_norms[n])
        return total / _LONGEST / len(known)

    def _weights(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Per n the tf-idf weight of every n-gram, the norms, and the number of words less one,
        which is the length that the reference implementation compares."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        every = math.log(max(self._num_items, 1))
        grams = _grams(text)
        for gram, count in grams.items():
            rarity = every - math.log(max(1, self._items_with[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(math.fsum(w * w for w in vector.values())) for vector in vectors]
        return vectors, norms, sum(c for g, c in grams.items() if len(g) == 2)


_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty for another length
_BETA = 1.2


@lru_cache(maxsize=1 << 16)
def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1)
    )


def _words(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()


def _rouge(said: list[str], known: Sequence[list[str]]) -> float:
    if not said:
        return 0.0
    shared = [LCSseq.similarity(said, words) for words in known]
    precision = max((s / len(said) for s in shared), default=0.0)
    recall = max((s / len(w) for s, w in zip(shared, known, strict=True) if w), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _token_f1(said: str, known: str) -> float:
    left, right = said.split(), known.split()
    if not left or not right:
        return float(left == right)
    shared = (Counter(left) & Counter(right)).total()
    return 2 * shared / (len(left) + len(right))


def _bare(text: str) -> str:
    """A label without what stands around it; one of marks alone, such as ``?``, is itself."""
    label = _BULLET.sub("", text.strip(), count=1) if _BULLET.match(text.strip()) else text.strip()
    return (label.strip(_AROUND) or label).lower()


def _is_label(said: str, labels: set[str]) -> bool:
    if _bare(said) in labels:
        return True
    letter = _LETTER.match(said.strip().lower())
    return letter is not None and letter[1] in labels
