"""The tables of a store: one definition each, as Arrow schemas.

What comes in are the legacy records (see ``legacy/``); what comes out is what every Parquet
file of a run holds. The column ``run`` is not stored: it is the folder name ``run=<id>``.

A *query* is the triple (dataset, split, query_id); ``query_id`` is the index of the question in
its split. An *example* is (dataset, split, example_id), the index of the item in its split;
pointers hold example ids. Scores without a unit are fractions in [0, 1]; log-probabilities are
natural logarithms (nats). Null always means "not known", never zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from lever_data.older import NAMES

# Ids of the official files: int64, but text in a run where one of them is not a plain integer
# (TextVQA's images, VizWiz's, A-OKVQA's questions). Views give them as text.
OFFICIAL_IDS = ("question_id", "image_id")

SHOT_SCORE = pa.struct(
    [
        pa.field("shot", pa.int8(), nullable=False),  # k: the prompt held the first k examples
        pa.field("correct", pa.int8()),  # 0 | 1
        pa.field("score", pa.float64()),  # of the metric, in [0, 1]
        pa.field("expected_score", pa.float64()),
        pa.field("answer", pa.string()),
        pa.field("eval_mode", pa.string()),
    ]
)

_QUERY_KEY = [
    pa.field("dataset", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("query_id", pa.int64(), nullable=False),
]

CANDIDATES = pa.schema(
    [
        *_QUERY_KEY,
        pa.field("candidate", pa.int32(), nullable=False),  # ordinal in the source, from 0
        pa.field("shot_num", pa.int8(), nullable=False),  # len(pointer)
        pa.field("pointer", pa.list_(pa.int32()), nullable=False),  # ordered example ids
        pa.field("pointer_pos", pa.list_(pa.int16())),  # positions in candidate_pool
        pa.field("gen_method", pa.string()),  # beam | sample | random | retrieval
        pa.field("beam_rank", pa.int32()),  # 0 = best beam
        pa.field("beam_score", pa.float64()),  # sum of the step probabilities
        pa.field("logprob_score", pa.float64()),  # nats, at `temperature`
        pa.field("temperature", pa.float64()),  # null: not sampled
        pa.field("eval_mode", pa.string()),  # file (official metric) | fallback | null
        pa.field("eval_split", pa.string()),  # split whose annotations scored the row
        pa.field("eval_failed", pa.bool_()),  # the answerer raised; see `error`
        pa.field("error", pa.string()),
        pa.field("answer", pa.string()),  # after post-processing
        pa.field("generation", pa.string()),
        pa.field("correct", pa.int8()),  # 0 | 1: the metric calls it right
        pa.field("score", pa.float64()),  # of the metric, in [0, 1]
        pa.field("expected_score", pa.float64()),  # under the model
        pa.field("token_f1", pa.float64()),
        pa.field("edit_sim", pa.float64()),
        pa.field("similarity", pa.float64()),  # the larger of the two
        pa.field("info_score", pa.float64()),  # InfoScore: gain in log-probability, nats
        pa.field("shot_scores", pa.list_(SHOT_SCORE)),
        pa.field("scorer", pa.string()),  # the model that answered
        pa.field("metric", pa.string()),
        pa.field("policy", pa.string()),  # what proposed the candidate
        pa.field("extra", pa.string()),  # JSON object of keys lever does not know
    ]
)

QUERIES = pa.schema(
    [
        *_QUERY_KEY,
        pa.field("question_id", pa.int64()),
        pa.field("image_id", pa.int64()),
        pa.field("question", pa.string()),
        pa.field("gt_answers", pa.list_(pa.string())),
        pa.field("candidate_pool", pa.list_(pa.int32())),  # example ids; null: a shared pool
        pa.field("extra", pa.string()),
    ]
)

EXAMPLES = pa.schema(
    [
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("question_id", pa.int64(), nullable=False),
        pa.field("image_id", pa.int64()),
        pa.field("image_path", pa.string()),  # relative to the image root
        pa.field("question", pa.string(), nullable=False),
        pa.field("answers", pa.list_(pa.string())),  # the annotators' answers, ten as a rule
        pa.field("answer", pa.string()),  # the one shown in a demonstration
    ]
)

# JSON object: further fields of an item, which templates show; only runs that have some hold it
EXTRA = pa.field("extra", pa.string())

EVALUATIONS = pa.schema(
    [
        *_QUERY_KEY,
        pa.field("selector", pa.string(), nullable=False),  # zero_shot, random, nearest, oracle, …
        pa.field("shots", pa.int8(), nullable=False),  # 0 for zero_shot
        pa.field("pointer", pa.list_(pa.int32()), nullable=False),  # ordered example ids shown
        pa.field("prediction", pa.string()),  # after post-processing; null: the answerer failed
        pa.field("accuracy", pa.float64()),  # official, in [0, 1]; null: failed
        pa.field("correct", pa.int8()),  # 1: accuracy > 0
        pa.field("error", pa.string()),
        pa.field("scorer", pa.string(), nullable=False),  # the answerer
        pa.field("metric", pa.string(), nullable=False),
    ]
)

TEXTS = pa.schema(
    [
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("example_id", pa.int64(), nullable=False),  # place in the source's list
        pa.field("text", pa.string(), nullable=False),
    ]
)

FEATURES = pa.schema(
    [
        *_QUERY_KEY,
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("name", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)

SWEEPS = pa.schema(
    [
        pa.field("sweep", pa.string(), nullable=False),
        pa.field("cell", pa.string(), nullable=False),  # digest of everything it depends on
        pa.field("settings", pa.string(), nullable=False),  # JSON: what differs between cells
        pa.field("accuracy", pa.float64(), nullable=False),  # mean over queries and shot numbers
        pa.field("low", pa.float64(), nullable=False),  # 95 % bootstrap interval
        pa.field("high", pa.float64(), nullable=False),
        pa.field("difference", pa.float64()),  # to the SFT model; null where there is none
        pa.field("difference_low", pa.float64()),
        pa.field("difference_high", pa.float64()),
        pa.field("num_queries", pa.int64(), nullable=False),
        pa.field("evaluation", pa.string(), nullable=False),  # run of its evaluation
        pa.field("checkpoint", pa.string(), nullable=False),
    ]
)


def todays(kind: pa.DataType | pa.Schema) -> Any:
    """A schema, or a type in it, with today's names for older ones (``lever_data/older.py``)."""
    if isinstance(kind, pa.Schema) or pa.types.is_struct(kind):
        fields = [f.with_name(NAMES.get(f.name, f.name)).with_type(todays(f.type)) for f in kind]
        return pa.schema(fields) if isinstance(kind, pa.Schema) else pa.struct(fields)
    if not pa.types.is_list(kind) or (inner := todays(kind.value_type)).equals(kind.value_type):
        return kind
    return pa.list_(kind.value_field.with_type(inner))


def under_todays_names(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a file, whenever it was written, with the columns' names of today."""
    schema = todays(batch.schema)
    if schema.equals(batch.schema):
        return batch
    columns = [c.view(f.type) for c, f in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def with_ids(table: pa.Schema, items: Iterable[Any]) -> pa.Schema:
    """The schema for rows of these items: ids of the official files as text where one is text."""
    known = list(items)
    text = {n for n in OFFICIAL_IDS if any(isinstance(getattr(i, n), str) for i in known)}
    return pa.schema([f.with_type(pa.string()) if f.name in text else f for f in table])


def id_array(values: Iterable[int | str | None]) -> pa.Array:
    """Ids of the official files as int64, or as text where one of them is text."""
    known = list(values)
    if any(isinstance(value, str) for value in known):
        return pa.array([None if v is None else str(v) for v in known], pa.string())
    return pa.array(known, pa.int64())


def embeddings(width: int) -> pa.Schema:
    """Schema of an embeddings table of vectors of ``width`` float32 numbers."""
    return pa.schema(
        [
            pa.field("dataset", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("example_id", pa.int64(), nullable=False),  # the row of the source tensor
            pa.field("vector", pa.list_(pa.float32(), width), nullable=False),
        ]
    )


TABLES: dict[str, pa.Schema] = {
    "candidates": CANDIDATES,
    "queries": QUERIES,
    "examples": EXAMPLES,
    "texts": TEXTS,
    "features": FEATURES,
    "evaluations": EVALUATIONS,
    "sweeps": SWEEPS,
}

SORT_KEYS: dict[str, tuple[str, ...]] = {
    "candidates": ("query_id", "candidate"),
    "queries": ("query_id",),
    "examples": ("example_id",),
    "embeddings": ("example_id",),
    "texts": ("example_id",),
    "features": ("query_id",),  # within it by place in the pool, then as features were named
    "evaluations": ("query_id",),
}

# Columns whose values hardly repeat: a dictionary of them takes time and a fifth more bytes.
DISTINCT = frozenset(
    (
        *(
            "query_id",
            "candidate",
            "example_id",
            "vector",
            "image_id",
            "question_id",
            "question",
            "text",
        ),
        *("beam_score", "logprob_score", "info_score", "expected_score"),
    )
)
