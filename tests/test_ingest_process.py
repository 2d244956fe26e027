"""The process of an ingest: what it does not import, and how a writer that fails ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest

from lever_data.sources.fields import Batches
from lever_data.sources.rl_ingest import _write_all
from lever_data.store.writer import RunWriter
from tests.torture.harness import write_rl_data


@pytest.mark.long
def test_pandas_stays_out_of_the_process(tmp_path: Path) -> None:
    fake = tmp_path / "lib" / "pandas"
    fake.mkdir(parents=True)
    marker = tmp_path / "imported"
    (fake / "__init__.py").write_text(
        f"import sys, traceback\n"
        f"open({str(marker)!r}, 'a').write(''.join(traceback.format_stack()))\n"
    )
    source = write_rl_data(tmp_path / "a.json", 3_000)
    words = ["ingest", str(source), "--store", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-m", "lever_cli", *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists(), marker.read_text()


class _Full:
    """A writer without memory."""

    def write(self, *_: object) -> None:
        raise MemoryError("full")


def test_a_writer_that_fails_in_any_way_ends_the_ingest() -> None:
    empty = pa.RecordBatch.from_pylist([], pa.schema([]))
    with pytest.raises(MemoryError, match="full"):
        _write_all(cast(RunWriter, _Full()), [Batches(empty, empty, 0)] * 100)
