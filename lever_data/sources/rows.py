"""Turn decoded RL records into Arrow batches of the candidates and queries tables.

In go (query id, value) pairs as the types of ``types.py`` decode them; out come two record
batches and the number of string tokens they account for, see ``layout.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lever_data.sources.candidates import candidate_batch
from lever_data.sources.layout import Built, Context, Layout, Record, info_keys, present
from lever_data.sources.queries import query_batch
from lever_data.sources.types import CANDIDATE_FIELDS, VALUE_FIELDS, Types


def find_layout(records: Iterable[Record], types: Types) -> Layout:
    """The layout of a file, taken from its first query that has a candidate."""
    layout = Layout((), ("pointer_candidates",), None, "file")
    for _, value in records:
        layout = Layout((), present(value, VALUE_FIELDS), info_keys(value, types), "file")
        for candidate in value.pointer_candidates[:1]:
            return Layout(
                present(candidate, CANDIDATE_FIELDS),
                layout.value_keys,
                layout.query_keys,
                "vqaEval" if candidate.vqa_eval_mode == "vqaEval" else "file",
            )
    return layout


def build(
    records: Sequence[Record], types: Types, layout: Layout, context: Context, *, all_keys: bool
) -> Built:
    """Record batches of ``records``, in their order.

    Args:
        all_keys: look for every key in every candidate. Otherwise only for those the first
            candidate has, which is faster; where others have more, ``tokens`` is too small.

    Raises:
        RefusedError: a pointer repeats an id, pointer and pointer_pos differ in length, or a
            query's id is not its key.
    """
    candidates, tokens = candidate_batch(records, types, layout, context, all_keys)
    queries, more = query_batch(records, types, layout, context)
    return Built(candidates, queries, -1 if tokens < 0 or more < 0 else tokens + more)
