"""Export gives back what was ingested: for every generation, spelling, order and unknown key."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

from lever_data.export import export
from lever_data.ingest import IngestOptions, ingest
from lever_data.store import Store
from tests.legacy_strategies import (
    Json,
    beam_files,
    difference,
    null_non_finite,
    rl_files,
    texts,
)

SLOW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def round_trip(text: bytes, folder: Path) -> Any:
    source, out = folder / "in.json", folder / "out.json"
    source.write_bytes(text)
    store = Store.create(folder / "store")
    (done,) = ingest([source], store, IngestOptions("d", "train"))
    export(store, done.run.run, out)
    return json.loads(out.read_bytes())


@SLOW
@given(texts(rl_files()))
def test_rl_data_comes_back_equal(case: tuple[Json, bytes]) -> None:
    file, text = case
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(text, Path(folder))
    assert difference(back, null_non_finite(file)) is None


@SLOW
@given(texts(beam_files()))
def test_beam_data_comes_back_equal(case: tuple[Json, bytes]) -> None:
    file, text = case
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(text, Path(folder))
    assert difference(back, null_non_finite(file)) is None
