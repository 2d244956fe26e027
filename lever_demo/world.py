"""A small visual-question world of our own: things on pictures, and questions about them.

In goes a :class:`WorldSpec`; out comes a :class:`World`, the same for the same spec. Nothing is
downloaded and there is no model in it.

Every item is a picture of one of 16 kinds of thing in one of 12 places, with one of four questions
about it in one of three wordings. The answer depends on the kind and the question. Ten annotators
answer; most agree, some give another answer to the same question.

What a selector gets to see of an item is an embedding as an encoder would make it: the kind and
the question are in it, but the place and the camera fill more of it. The similarity of two
embeddings is therefore mostly the similarity of two places, and the demonstration that looks most
alike seldom has the answer. Which directions matter can be learned from rewards. The world's
answerer looks at the pictures with eyes of its own (``vision``): it sees kinds, not places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Floats = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Ints = np.ndarray[tuple[int], np.dtype[np.int64]]

QUESTIONS = (
    ("What is this used for?", "What do people do with this?", "Why would you want this?"),
    ("What is it made of?", "Which material is this?", "What material do you see?"),
    ("What makes it work?", "What drives this?", "Where does it get its power?"),
    ("Who uses this?", "Whose thing is this?", "Who would own this?"),
)
# kind: (use, material, power, user)
KINDS = {
    "kettle": ("making tea", "steel", "electricity", "cook"),
    "pan": ("cooking", "iron", "fire", "cook"),
    "lantern": ("light", "glass", "fire", "camper"),
    "tent": ("sleeping", "nylon", "nothing", "camper"),
    "windmill": ("grinding", "wood", "wind", "farmer"),
    "tractor": ("plowing", "steel", "diesel", "farmer"),
    "wheelbarrow": ("carrying", "plastic", "hands", "gardener"),
    "watering can": ("watering", "zinc", "hands", "gardener"),
    "sailboat": ("sailing", "fiberglass", "wind", "sailor"),
    "anchor": ("mooring", "iron", "gravity", "sailor"),
    "violin": ("music", "wood", "bow", "musician"),
    "drum": ("rhythm", "leather", "sticks", "musician"),
    "bicycle": ("riding", "aluminum", "legs", "commuter"),
    "umbrella": ("staying dry", "nylon", "hands", "commuter"),
    "telescope": ("stargazing", "glass", "light", "astronomer"),
    "globe": ("geography", "paper", "hands", "teacher"),
}
PLACES = 12
USUAL_PLACES = 3  # of each kind; the others are as likely together as these
ANNOTATORS = 10

# Lengths of the parts of an embedding. An unlearned eye sees mostly places and cameras.
_QUESTION, _WORDING, _KIND, _PLACE, _CAMERA = 1.0, 0.7, 0.5, 1.2, 1.0
_WIDTH = 16  # dimensions of each part but the camera's
_CAMERA_WIDTH = 32
_BLUR = 0.05  # of the answerer's own eyes


@dataclass(frozen=True)
class WorldSpec:
    """How large the world is.

    Args:
        train: items whose rewards are known; they are also the demonstrations.
        held_out: items for the final comparison; none of them is a demonstration.
        pool: demonstrations a query may choose from.
        seed: of every random number.
    """

    train: int = 2400
    held_out: int = 800
    pool: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Items:
    """n items: what they are, what is asked, what ten people answered, how they look.

    ``kind``, ``asked``, ``wording``, ``place``: int64 [n]; ``answers``: n lists of ten;
    ``embedding``: float32 [n, 96], unit length; ``vision``: float32 [n, 32], unit length.
    """

    kind: Ints
    asked: Ints
    wording: Ints
    place: Ints
    answers: list[list[str]]
    embedding: Floats
    vision: Floats

    def __len__(self) -> int:
        return len(self.answers)

    def question(self, item: int) -> str:
        """The question as it is put."""
        return QUESTIONS[self.asked[item]][self.wording[item]]


@dataclass(frozen=True)
class World:
    """Two disjoint sets of items, and for each the train items its queries may be shown.

    ``train_pool`` [train, K] and ``held_out_pool`` [held_out, K]: int64 train items, most similar
    embedding first; an item is never in its own pool.
    """

    spec: WorldSpec
    train: Items
    held_out: Items
    train_pool: np.ndarray
    held_out_pool: np.ndarray


def make_world(spec: WorldSpec) -> World:
    """Draw the world of a spec."""
    rng = np.random.default_rng(spec.seed)
    total = spec.train + spec.held_out
    items = _draw_items(rng, total)
    train, held_out = _part(items, 0, spec.train), _part(items, spec.train, total)
    return World(
        spec,
        train,
        held_out,
        nearest(train.embedding, train.embedding, spec.pool, leave_out_self=True),
        nearest(held_out.embedding, train.embedding, spec.pool),
    )


def nearest(
    queries: Floats, candidates: Floats, count: int, *, leave_out_self: bool = False
) -> np.ndarray:
    """The ``count`` candidates with the largest dot product, largest first, int64 [n, count].

    Ties go to the lower index. ``leave_out_self``: candidate i is not offered to query i.
    """
    similarity = np.round(queries.astype(np.float64) @ candidates.T.astype(np.float64), 9)
    if leave_out_self:
        np.fill_diagonal(similarity, -np.inf)
    order: np.ndarray = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return order


def _draw_items(rng: np.random.Generator, count: int) -> Items:
    kind = rng.integers(len(KINDS), size=count)
    asked = rng.integers(len(QUESTIONS), size=count)
    wording = rng.integers(len(QUESTIONS[0]), size=count)
    usual = np.stack([rng.permutation(PLACES)[:USUAL_PLACES] for _ in KINDS])
    at_home = rng.random(count) < 0.5
    place = np.where(
        at_home,
        usual[kind, rng.integers(USUAL_PLACES, size=count)],
        rng.integers(PLACES, size=count),
    )
    answers = [_annotate(rng, int(k), int(a)) for k, a in zip(kind, asked, strict=True)]
    embedding = _embed(rng, kind, asked, wording, place)
    vision = _see(rng, kind, asked)
    return Items(kind, asked, wording, place, answers, embedding, vision)


def _annotate(rng: np.random.Generator, kind: int, asked: int) -> list[str]:
    """Ten answers: six to ten people say what is so, the others something else one could say."""
    possible = [answers[asked] for answers in KINDS.values()]
    truth = possible[kind]
    others = sorted(set(possible) - {truth})
    agree = int(rng.integers(6, ANNOTATORS + 1))
    wrong = rng.integers(len(others), size=ANNOTATORS - agree)
    said = [truth] * agree + [others[i] for i in wrong]
    return [said[i] for i in rng.permutation(ANNOTATORS)]


def _embed(rng: np.random.Generator, kind: Ints, asked: Ints, wording: Ints, place: Ints) -> Floats:
    """Embeddings as an encoder would make them: every part of the item, mixed by a rotation."""
    n = len(kind)
    phrase = asked * len(QUESTIONS[0]) + wording
    parts = [
        _QUESTION * _vectors(rng, len(QUESTIONS))[asked],
        _WORDING * _vectors(rng, len(QUESTIONS) * len(QUESTIONS[0]))[phrase],
        _KIND * _vectors(rng, len(KINDS))[kind],
        _PLACE * _vectors(rng, PLACES)[place],
        _CAMERA * rng.standard_normal((n, _CAMERA_WIDTH)) / np.sqrt(_CAMERA_WIDTH),
    ]
    stacked = np.concatenate(parts, axis=1)
    rotation, _ = np.linalg.qr(rng.standard_normal((stacked.shape[1], stacked.shape[1])))
    return _unit(stacked @ rotation)


def _see(rng: np.random.Generator, kind: Ints, asked: Ints) -> Floats:
    """What the answerer sees: the question and the kind, a little blurred."""
    parts = [_vectors(rng, len(QUESTIONS))[asked], _vectors(rng, len(KINDS))[kind]]
    clear = np.concatenate(parts, axis=1)
    return _unit(clear + _BLUR * rng.standard_normal(clear.shape))


def _vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    """``count`` random directions."""
    drawn = rng.standard_normal((count, _WIDTH))
    unit: np.ndarray = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def _unit(vectors: np.ndarray) -> Floats:
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _part(items: Items, low: int, high: int) -> Items:
    return Items(
        items.kind[low:high],
        items.asked[low:high],
        items.wording[low:high],
        items.place[low:high],
        items.answers[low:high],
        items.embedding[low:high],
        items.vision[low:high],
    )
