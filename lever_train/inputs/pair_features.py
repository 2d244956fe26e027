"""Features of the pairs that a selector is to read: from vectors, pools and answers to [n, K, F].

In go :class:`Pairs`, queries with the pools they choose from; out come the values of named features
(``lever_data.relations.features``), computed block by block and kept as a run of the store, so that
the same pairs are computed once. What a feature may read of answers is decided here: of candidates
that are the query itself, or ask the same question in the query's own split, it sees none.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lever_data.catalog import Relation, features
from lever_data.errors import LeverError
from lever_data.items.prompts import Item
from lever_data.relations import features as sql
from lever_data.store.integrity import require_intact
from lever_data.store.schema import FEATURES
from lever_data.store.store import RunSpec, Store
from lever_train.inputs.embeddings import load_embeddings

_BLOCK = 1 << 18  # pairs computed at once
RIGHT = 10 / 3  # the share of annotators that makes an answer right is its inverse
_NO_LETTER = re.compile(r"[\W_]+")  # all but what str.isalnum() is true of
_GATHER = 64  # queries whose candidates' vectors are gathered at once, in float64

Ids = np.ndarray
Values = np.ndarray
Spaces = Mapping[tuple[str, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pairs:
    """n queries and the pools of K candidates they choose from.

    ``con`` reads the store's named vectors; ``None``: there is no store. ``place``: dataset, split
    of the queries, split of the candidates. ``query_ids`` [n] int64;
    ``pool`` [n, K] int64 example ids, -1 where padded; ``query`` [n, d] and ``table`` [m, d] the
    vectors whose cosine is the similarity; ``asked`` n questions; ``examples`` by example id.
    """

    con: duckdb.DuckDBPyConnection | None
    place: tuple[str, str, str]
    query_ids: Ids
    pool: Ids
    query: Tensor
    table: Tensor
    asked: Sequence[str]
    examples: Mapping[int, Item]

    @property
    def is_own(self) -> bool:
        """Whether candidates and queries are of one split."""
        return self.place[1] == self.place[2]


@dataclass(frozen=True)
class PairFeatures:
    """``values`` [n, K, F] float32, 0 where a pool is padded, of ``query_ids`` [n] ascending.

    ``names`` of the F values; ``features`` as checkpoints name them, ``vote@1b2c3d4e5f60``, by the
    digest of their SQL; ``run`` holds the values in the store; ``answers``, where votes are read,
    is what they are counted from when they are asked for: of all queries they are n·K².
    """

    query_ids: Ids
    values: Values
    names: tuple[str, ...]
    features: tuple[str, ...]
    run: str
    answers: Answers | None = None

    def of(self, query_ids: Ids, size: int) -> Values:
        """Values [B, size, F] of these queries, whose pools hold at most ``size``; where votes
        are read [B, size, F + size], see :class:`Pool`."""
        rows = np.searchsorted(self.query_ids, query_ids)
        values = self.values[rows, :size]
        if self.answers is None:
            return values
        return np.concatenate([values, self.answers.votes(rows)[:, :size, :size]], axis=-1)


def pair_features(
    store: Store, pairs: Pairs, names: Sequence[str], *, votes: bool = False
) -> PairFeatures:
    """The features of these names, from the store where they were computed before, and the votes
    of the pool where they are read.

    Raises:
        UsageError: there is no such feature, or no such vectors.
        LeverError: a feature cannot be computed; see ``relations.features.compute``.
    """
    asked = sql.find_features(names, store.path)
    named = tuple(f"{feature.name}@{sql.sha256(feature)}" for feature in asked)
    spaces = _spaces(pairs, sql.cosines_read(asked))
    spec = RunSpec(
        kind="features",
        dataset=pairs.place[0],
        split=pairs.place[1],
        source={"path": ", ".join(named)},
        source_sha256=_digest(pairs, spaces),
        parameters={"features": list(named), "candidate_split": pairs.place[2]},
    )
    real = pairs.pool >= 0
    run = store.find(spec)
    if run is None:
        columns: list[str] = []
        with store.begin(spec) as writer:
            for part, columns, values, _ in _blocks(pairs, asked, spaces):
                writer.write("features", _rows(pairs, part, columns, values))
            run = writer.commit({"names": columns})
    require_intact([run])
    found = tuple(run.details["names"])
    flat = [
        pq.read_table(file, columns=["value"])["value"].to_numpy()
        for file in run.table_files("features")
    ]
    made = np.zeros((*real.shape, len(found)), np.float32)
    made[real] = np.concatenate(flat).reshape(-1, len(found))
    answers = Answers(pairs) if votes else None
    return PairFeatures(pairs.query_ids, made, found, named, run.run, answers)


def pair_values(
    pairs: Pairs, asked: Sequence[Relation], spaces: Spaces, *, votes: bool = False
) -> Values:
    """What :meth:`PairFeatures.of` gives, of pairs of no store; nothing is kept.

    ``spaces``: vectors of queries [n, d] and candidates [m, d] for every cosine that is read.

    Raises:
        LeverError: a feature cannot be computed.
    """
    units = {
        name: (normalize(query, dim=-1), normalize(table, dim=-1))
        for name, (query, table) in spaces.items()
    }
    found = [values for _, _, values, _ in _blocks(pairs, asked, units, alone=False)]
    values = np.concatenate(found)
    made = np.zeros((*pairs.pool.shape, values.shape[1]), np.float32)
    made[pairs.pool >= 0] = values
    answers = Answers(pairs) if votes else None
    return PairFeatures(pairs.query_ids, made, (), (), "", answers).of(
        pairs.query_ids, pairs.pool.shape[1]
    )


def votes(pairs: Pairs) -> tuple[Values, Values]:
    """The share of the pool's votes for each candidate's answer at softmax(cosine / 0.05), and the
    cosine, both [n, K]; -1 where padded. Candidates vote for the answers of their annotators."""
    share, cosine = np.full((2, *pairs.pool.shape), -1.0)
    for part, names, values, near in _blocks(pairs, [features()["vote"]], {}):
        real = pairs.pool[part] >= 0
        share[part][real] = values[:, names.index("vote_05")]
        cosine[part][real] = near
    return share, cosine


def _spaces(pairs: Pairs, cosines: Sequence[tuple[str, str]]) -> Spaces:
    """Unit vectors of queries [n, d] and candidates [m, d] for every cosine that is read."""
    dataset, split, candidate_split = pairs.place

    @cache
    def units(name: str, split: str) -> Tensor:
        assert pairs.con is not None  # where there is no store, vectors are given
        return normalize(load_embeddings(name, pairs.con, (dataset, split)), dim=-1)

    found = {}
    for left, right in cosines:
        query, table = units(left, split)[pairs.query_ids], units(right, candidate_split)
        if query.shape[1] != table.shape[1] or len(table) <= int(pairs.pool.max(initial=-1)):
            raise LeverError(
                "a feature compares vectors of two widths, or of another split",
                where=f"cosine__{left}__{right}",
                value=f"{list(query.shape)} and {list(table.shape)}",
            )
        found[left, right] = (query, table)
    return found


def _blocks(
    pairs: Pairs,
    asked: Sequence[Relation],
    spaces: Spaces,
    *,
    alone: bool = True,
) -> Iterator[tuple[slice, list[str], Values, Values]]:
    """Rows of the queries; names and values [R, F] of their R pairs, and similarities [R]."""
    n, K = pairs.pool.shape
    answers = Answers(pairs) if n else None
    size = max(1, _BLOCK // K)
    unit = normalize(pairs.query, dim=-1), normalize(pairs.table, dim=-1)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        assert answers is not None
        pool = pairs.pool[part]
        real = pool >= 0
        query, place = np.nonzero(real)
        near = cosines(unit[0][part], unit[1], pool)[real]
        columns = {
            "query": pa.array(query, pa.int32()),
            "place": pa.array(place, pa.int32()),
            "similarity": pa.array(near),
        }
        for (left, right), (vectors, table) in spaces.items():
            cosine = cosines(vectors[part], table, pool)[real]
            columns[f"cosine__{left}__{right}"] = pa.array(cosine)
        columns["answer"] = answers.shown(part, query, pool[real])
        tables = {sql.PAIRS: pa.table(columns)}
        if sql.reads_answers(asked):
            tables[sql.ANSWERS] = answers.given(part, query, place, pool[real])
        yield part, *sql.compute(asked, tables, alone=alone and start == 0), near


def cosines(query: Tensor, table: Tensor, pool: Ids) -> Values:
    """Cosines [B, K] of unit vectors, rounded: the last bits would differ from block to block."""
    found = np.empty(pool.shape)
    ids = torch.from_numpy(np.where(pool < 0, 0, pool))
    for start in range(0, len(pool), _GATHER):
        part = slice(start, start + _GATHER)
        near = table[ids[part]].double()
        cosine = torch.einsum("bd,bkd->bk", query[part].double(), near)
        found[part] = cosine.round(decimals=sql.DECIMALS).numpy()
    return found


class Answers:
    """What annotators said of every example, as flat arrays, and who may not be read."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, codes = pairs, dict[str, int]()
        last = max(int(pairs.pool.max(initial=-1)), *pairs.examples, 0)
        self.of = np.full(last + 1, -1, dtype=np.int64)  # example → its answer
        self.asks = np.full(last + 1, -1, dtype=np.int64)  # example → its question
        sizes = np.zeros(last + 2, dtype=np.int64)
        code, share, questions = [], [], dict[str, int]()
        for number, item in sorted(pairs.examples.items()):
            self.asks[number] = questions.setdefault(_plain(item.question), len(questions))
            if item.answer is not None:
                self.of[number] = codes.setdefault(item.answer, len(codes))
            for text, count in Counter(item.answers).items():
                code.append(codes.setdefault(text, len(codes)))
                share.append(count / len(item.answers))
                sizes[number + 1] += 1
        self.starts, self.code = sizes.cumsum(), np.array(code, dtype=np.int64)
        self.share = np.array(share)
        self.words = pa.array(list(codes), pa.string())
        self.question = np.array([questions.get(_plain(text), -2) for text in pairs.asked])

    @classmethod
    def of_rows(cls, examples: pa.Table, place: tuple[str, str, str]) -> Answers:
        """The same of a table whose row is the example's number, where no query is an example.

        Its columns ``answers`` and ``answer``; where the latter is null, the majority.

        Raises:
            LeverError: an annotator's answer is null.
        """
        none, empty = np.zeros((0, 1), dtype=np.int64), torch.zeros(0, 0)
        found = cls(Pairs(None, place, none[:, 0], none, empty, empty, [], {}))
        lists = examples.column("answers").combine_chunks()
        size, rows = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), len(lists)
        given, shown = lists.flatten(), examples.column("answer").combine_chunks()
        if given.null_count:
            raise LeverError("an example has an answer that is null", value=given.null_count)
        every = pa.concat_arrays([given, shown]).dictionary_encode()
        code = pc.fill_null(every.indices, -1).to_numpy().astype(np.int64)
        width = len(every.dictionary) + 1
        keys, first, count = np.unique(
            np.repeat(np.arange(rows), size) * width + code[: len(given)],
            return_index=True,
            return_counts=True,
        )
        of, found.code = keys // width, keys % width  # (row, answer): each once
        found.share, found.words = count / size[of], every.dictionary
        found.starts = np.concatenate([[0], np.bincount(of, minlength=rows).cumsum()])
        # the majority: most annotators first, of equals the one who is named first
        order = np.lexsort((first, -count, of))
        has_any = np.diff(found.starts) > 0
        most = np.full(rows, -1, dtype=np.int64)
        most[has_any] = found.code[order[found.starts[:-1][has_any]]]
        found.of = np.where(code[len(given) :] < 0, most, code[len(given) :])
        found.asks = np.full(rows, -1, dtype=np.int64)
        return found

    def votes(self, rows: Ids) -> Values:
        """What every place of the pool gives to each candidate's answer, float32 [B, K, K]: row
        the candidate, column who votes.

        min(1, 10/3 of the share of the voter's annotators): what the answer would have earned
        there, three of ten annotators making it right. 0 where either's answers are hidden.
        """
        pool = self.pairs.pool[rows]
        query, place = np.nonzero(pool >= 0)
        example, size = pool[query, place], len(self.words)
        open_ = ~self._hidden(rows, query, example)
        own = self.of[example]
        shows = open_ & (own >= 0)
        # the distinct answers of a pool are numbered in it: those of query b from first[b] on
        keys, number = np.unique(query[shows] * size + own[shows], return_inverse=True)
        first = np.searchsorted(keys, np.arange(len(pool)) * size)
        row, at = self.said(example, open_)
        wanted = query[row] * size + self.code[at]
        found = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
        hit = keys[found] == wanted if len(keys) else np.zeros(len(row), dtype=bool)
        row, at, found = row[hit], at[hit], found[hit]
        given = np.zeros((*pool.shape, pool.shape[1]), np.float32)  # query, answer, voter
        given[query[row], found - first[query[row]], place[row]] = np.minimum(
            1.0, self.share[at] * RIGHT
        )
        votes = np.zeros_like(given)
        of = query[shows]
        votes[of, place[shows]] = given[of, number - first[of]]
        return votes

    def _hidden(self, part: slice | Ids, query: Ids, example: Ids) -> np.ndarray:
        """Pairs whose answers no feature may read: the query's own, and those of its question."""
        if not self.pairs.is_own:
            return np.zeros(len(query), dtype=bool)
        own = self.pairs.query_ids[part][query] == example
        return np.asarray(own | (self.question[part][query] == self.asks[example]))

    def said(self, example: Ids, is_open: np.ndarray) -> tuple[Ids, Ids]:
        """What annotators said of the open ones of examples [R]: each answer's place in [R], and
        its index into ``code`` and ``share``."""
        sizes = np.where(is_open, self.starts[example + 1] - self.starts[example], 0)
        row = np.repeat(np.arange(len(example)), sizes)
        within = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return row, self.starts[example][row] + within

    def among(self, pairs: Pairs) -> Answers:
        """The same examples in the pools of other queries, of another split."""
        later = copy.copy(self)
        later.pairs = pairs
        return later

    def shown(self, part: slice, query: Ids, example: Ids) -> pa.Array:
        """The answer each pair's candidate shows, null where it may not be read."""
        code = np.where(self._hidden(part, query, example), -1, self.of[example])
        return self.words.take(pa.array(code, mask=code < 0))

    def given(self, part: slice, query: Ids, place: Ids, example: Ids) -> pa.Table:
        """The relation ``pool_answers``."""
        row, at = self.said(example, ~self._hidden(part, query, example))
        return pa.table(
            {
                "query": pa.array(query[row], pa.int32()),
                "place": pa.array(place[row], pa.int32()),
                "answer": self.words.take(pa.array(self.code[at])),
                "share": pa.array(self.share[at]),
            }
        )


def _plain(question: str) -> str:
    """A question as it is compared: letter case, punctuation and spaces do not make another."""
    return _NO_LETTER.sub("", question.lower())


def _rows(pairs: Pairs, part: slice, names: Sequence[str], values: Values) -> pa.Table:
    """The table ``features`` of a block."""
    query, place = np.nonzero(pairs.pool[part] >= 0)
    count = len(names)
    codes = pa.array(np.tile(np.arange(count, dtype=np.int32), len(query)))
    columns = [
        *(pa.repeat(text, values.size) for text in pairs.place[:2]),
        pa.array(np.repeat(pairs.query_ids[part][query], count)),
        pa.array(np.repeat(pairs.pool[part][query, place], count)),
        pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string())),
        pa.array(values.ravel()),
    ]
    return pa.Table.from_arrays(columns, schema=FEATURES)


def _digest(pairs: Pairs, spaces: Spaces) -> str:
    """A digest of everything values depend on beside the SQL."""
    digest = hashlib.sha256(repr(list(pairs.asked)).encode())
    vectors = [pairs.query, pairs.table, *(table for pair in spaces.values() for table in pair)]
    for array in (pairs.query_ids, pairs.pool, *(table.numpy() for table in vectors)):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    for number, item in sorted(pairs.examples.items()):
        digest.update(repr((number, item.question, item.answer, item.answers)).encode())
    return digest.hexdigest()
