"""Decoding in blocks: no result depends on where the text is cut, and every file comes back."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lever_data.errors import LeverError
from lever_data.sources.beam import BeamFormat
from lever_data.sources.decode import LegacyReader, RestartError
from lever_data.sources.export import BeamRecords, RlRecords
from lever_data.sources.fields import Context
from lever_data.sources.rl import RlFormat
from lever_data.store.schema import CANDIDATES, QUERIES
from tests.legacy_strategies import (
    Json,
    beam_files,
    difference,
    null_non_finite,
    rl_files,
    texts,
)

FAST = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
THOROUGH = settings(FAST, max_examples=3000)


def read(
    text: bytes,
    form: RlFormat | BeamFormat,
    block: int,
    *,
    restart: bool = False,
) -> tuple[Json, dict[str, Any]]:
    """Ingest and export in memory: the file as it comes back, and its rows."""
    stream = io.BytesIO(text)
    reader = LegacyReader(stream.read, "file", form, block=block)
    try:
        built = list(reader.batches())
    except RestartError as late:
        if not restart:
            raise
        context = Context("d", "s", late.scorer)
        return read(text, RlFormat(context), block)
    queries = pa.Table.from_batches([b.queries for b in built], QUERIES).to_pylist()
    candidates = pa.Table.from_batches([b.candidates for b in built], CANDIDATES).to_pylist()
    by_query: dict[int, list[Json]] = {row["query_id"]: [] for row in queries}
    for row in candidates:
        by_query[row["query_id"]].append(row)
    layout = form.layout if isinstance(form, RlFormat) else None
    records = RlRecords(layout) if layout is not None else BeamRecords()
    back = dict(reader.found.top)
    for row in queries:
        back[str(row["query_id"])] = records.value(row["query_id"], row, by_query[row["query_id"]])
    for row in (*candidates, *queries):
        row["extra"] = without_notes(row["extra"])
    return back, {"candidates": candidates, "queries": queries}


def without_notes(extra: str | None) -> Json:
    """The unknown keys of a row; notes depend on the layout, which the first block decides."""
    members: Json = json.loads(extra or "{}")
    members.pop("_lever", None)
    return members


def check_rl(file: Json, text: bytes, block: int) -> None:
    scorer = file.get("_meta", {}).get("vqa_model")
    first, rows = read(text, RlFormat(Context("d", "s", scorer)), 1 << 20)
    assert difference(first, null_non_finite(file)) is None
    again, rows_again = read(text, RlFormat(Context("d", "s", scorer)), block)
    assert difference(again, null_non_finite(file)) is None
    assert rows == rows_again


@pytest.mark.slow
@FAST
@given(texts(rl_files()), st.integers(1, 600))
def test_rl_data_is_the_same_in_blocks_of_any_size(case: tuple[Json, bytes], block: int) -> None:
    check_rl(*case, block)


@pytest.mark.long
@THOROUGH
@given(texts(rl_files()), st.integers(1, 600))
def test_rl_data_in_blocks_thoroughly(case: tuple[Json, bytes], block: int) -> None:
    check_rl(*case, block)


@pytest.mark.slow
@FAST
@given(texts(beam_files()), st.integers(1, 200))
def test_beams_are_the_same_in_blocks_of_any_size(case: tuple[Json, bytes], block: int) -> None:
    check_beams(*case, block)


@pytest.mark.long
@THOROUGH
@given(texts(beam_files()), st.integers(1, 200))
def test_beams_in_blocks_thoroughly(case: tuple[Json, bytes], block: int) -> None:
    check_beams(*case, block)


def check_beams(file: Json, text: bytes, block: int) -> None:
    back, rows = read(text, BeamFormat(Context("d", "s", None)), block)
    assert difference(back, null_non_finite(file)) is None
    for row in rows["candidates"]:
        beam = file[str(row["query_id"])]["id_list"][row["candidate"]]
        assert [*row["pointer"], row["query_id"]] == beam
        assert row["beam_rank"] == row["candidate"]
        assert row["shot_num"] == len(beam) - 1


def test_meta_behind_the_queries_asks_for_a_second_reading() -> None:
    text = b'{"1": {"pointer_candidates": [{"pointer": [2]}]}, "_meta": {"vqa_model": "m"}}'
    with pytest.raises(RestartError) as found:
        read(text, RlFormat(Context("d", "s", None)), 10)
    assert found.value.scorer == "m"
    _, rows = read(text, RlFormat(Context("d", "s", "m")), 10)
    assert [row["scorer"] for row in rows["candidates"]] == ["m"]


def test_a_boundary_inside_a_value_is_not_taken_for_one() -> None:
    inner: Json = {"a": {"pointer_candidates": []}, "5": {"pointer_candidates": []}, "b": {}}
    record = {"pointer_candidates": [{"pointer": [1], "note": inner, "t": '}, "5": {'}]}
    file = {str(i): record for i in range(20)}
    text = json.dumps(file).encode()
    for block in (10, 50, 100, 150, 1000):
        back, _ = read(text, RlFormat(Context("d", "s", None)), block)
        assert back == file


@pytest.mark.parametrize(
    "inner",
    [
        '"beam_score": 1, "beam_score": 2',
        '"note": {"a": 1, "b": 2, "a": 3}',
        '"gen_method": "beam", "gen_method": "\\"be\\\\am\\""',
        '"pointer": [3]',
    ],
)
def test_a_key_that_occurs_twice_is_found_at_any_depth(inner: str) -> None:
    good = '"0": {"pointer_candidates": [{"pointer": [1], "note": 0}]}'
    text = f'{{{good}, "1": {{"pointer_candidates": [{{"pointer": [1], {inner}}}]}}}}'.encode()
    with pytest.raises(LeverError, match="a key occurs twice") as found:
        read(text, RlFormat(Context("d", "s", None)), 1 << 20)
    assert "query '1'" in str(found.value.where)
    assert "pointer_candidates[0]." in str(found.value.where)


def many_queries(count: int) -> Json:
    """A file with what each path must deal with, somewhere beyond its first blocks."""
    file: Json = {}
    for i in range(count):
        record: Json = {"pointer": [i + 1, i], "vqa_correct": i % 2, "vqa_eval_mode": "file"}
        if i % 50 == 30:
            record |= {"note": {"z": i, "a": [1.5, None]}, "b": "x"}
        if i % 70 == 40:
            record["beam_score"] = float("nan")
        file[str(i)] = {"pointer_candidates": [record] * (i % 4)}
    return file


def test_a_fault_far_behind_is_found_in_a_file_of_many_blocks() -> None:
    text = json.dumps(many_queries(2_000)).encode()
    at = text.index(b'"1800": ')
    again = text[:at] + b'"17": {"pointer_candidates": []}, ' + text[at:]
    with pytest.raises(LeverError, match="a query occurs twice") as found:
        read(again, RlFormat(Context("d", "s", None)), 5_000)
    assert f"byte {at}" in str(found.value.where)


@pytest.mark.long
def test_a_file_of_many_blocks_comes_back_equal() -> None:
    file = many_queries(2_000)
    back, _ = read(json.dumps(file).encode(), RlFormat(Context("d", "s", None)), 5_000)
    assert difference(back, null_non_finite(file)) is None
