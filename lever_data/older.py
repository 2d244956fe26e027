"""What columns were called before, and are now: in files, in queries, in rewards.

Until schema 2 candidates had the names of the legacy data whatever the task was. Runs of that time
are read under today's names (``catalog.read_parquet_sql``, ``store/schema.py``), and SQL that says
an older name where there is none is bound with today's. Legacy JSON keeps its keys.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping
from functools import cache

_LOG = logging.getLogger("lever.names")

# older name → today's, of columns and of the fields of shot_scores
NAMES = {
    "vqa_pred_answer": "answer",
    "vqa_raw_generation": "generation",
    "vqa_correct": "correct",
    "vqa_acc_score": "score",
    "vqa_gt_prob": "expected_score",
    "vqa_rel_token_f1": "token_f1",
    "vqa_rel_edit_sim": "edit_sim",
    "vqa_rel_score": "similarity",
    "metric_version": "metric",
}
VIEWS = {"answers": "all_candidates"}  # had today's names beside the older ones
_NAME = re.compile(rf'"?({"|".join(NAMES)})\b"?'.encode(), re.IGNORECASE)


def with_todays_names(sql: str, known: Container[str] = ()) -> tuple[str, dict[str, str]]:
    """SQL with today's names where it says older ones that are not ``known``, and what was renamed.

    Only identifiers count: not the words of a comment or of a literal.
    """
    import duckdb  # here: who ingests needs the names alone

    text, end = sql.encode(), 0
    parts: list[bytes] = []
    renamed: dict[str, str] = {}
    for offset, kind in duckdb.tokenize(sql) if _NAME.search(text) else ():
        found = _NAME.match(text, offset) if kind == duckdb.token_type.identifier else None
        if found is None or (older := found[1].decode().lower()) in known:
            continue
        renamed[older] = NAMES[older]
        parts += [text[end:offset], NAMES[older].encode()]
        end = found.end()
    return b"".join([*parts, text[end:]]).decode(), renamed


def as_asked(column: str, sql: str, renamed: Mapping[str, str]) -> str:
    """The name of a result's column as the SELECT ``sql`` says it, before it was renamed."""
    if re.search(rf"(?<!\w){re.escape(column)}(?!\w)", sql):
        return column  # the caller's own
    for older, name in renamed.items():
        column = re.sub(rf"\b{name}\b", older, column)
    return column


def told(renamed: Mapping[str, str]) -> str:
    """What is called how now, in words."""
    return ", ".join(f"{older} is called {name} now" for older, name in renamed.items())


def tell(renamed: Mapping[str, str]) -> None:
    """Say it, one line a name and process: on stderr, where nobody handles the log ``lever.names``
    otherwise."""
    for older, name in renamed.items():
        _tell_once(older, name)


@cache
def _tell_once(older: str, name: str) -> None:
    _LOG.warning("%s", told({older: name}))
