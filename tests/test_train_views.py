"""Training on a view of the user's own: rows that could not be trained on are refused, not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from lever_data.errors import LeverError
from tests.cases import long
from tests.training import Bench


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nullif(query_id, 1) as query_id", "rows of the view lack a query"),
        long("nullif(split, 'train') as split", "rows of the view lack a query"),
        long("query_id - 5 as query_id", "rows of the view lack a query"),
        long("null::integer as candidate", "rows of the view lack a candidate"),
        (
            "case when query_id > 1 then pointer end as pointer",
            "rows of the view lack a pointer",
        ),
    ],
)
def test_rows_that_would_vanish_are_refused(tmp_path: Path, change: str, message: str) -> None:
    bench = Bench(tmp_path)
    views = bench.store.path / "views"
    views.mkdir()
    (views / "odd.sql").write_text(f"select * replace ({change}) from all_candidates")
    with pytest.raises(LeverError, match=message) as error:
        bench.train(view=["odd"])
    assert error.value.where == "odd"


@pytest.mark.long
def test_ids_written_as_text_are_numbers_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    views = bench.store.path / "views"
    views.mkdir()
    sql = "select * replace (query_id::varchar as query_id) from all_candidates"
    (views / "odd.sql").write_text(sql)
    bench.train(view=["odd"])
