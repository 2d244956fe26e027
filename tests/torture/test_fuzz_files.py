"""Mutated files of every other kind, and values of a gigabyte: ingested or refused, no worse."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lever_data.errors import LeverError
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from tests.torture.conftest import Report
from tests.torture.harness import SIZES, command, verify
from tests.torture.test_fuzz_json import mutate

BEAMS = {str(q): {"id_list": [[1, 2, q], [3, 4, q]], "score_list": [0.5, 0.25]} for q in range(9)}
QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"question_id": 10 + i, "image_id": i, "question": f'what "is" {i}?'} for i in range(5)
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 10 + i,
            "image_id": i,
            "answers": [{"answer": word, "answer_id": k} for k, word in enumerate(("two", "2"))],
        }
        for i in range(5)
    ]
}


def _npy() -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, np.arange(12, dtype=np.float32).reshape(3, 4))
    return buffer.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "beams.json": lambda: json.dumps(BEAMS).encode(),
    "questions.json": lambda: json.dumps(QUESTIONS).encode(),
    "annotations.json": lambda: json.dumps(ANNOTATIONS).encode(),
    "beams.json.gz": lambda: gzip.compress(json.dumps(BEAMS).encode(), mtime=0),
    "vectors.npy": _npy,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("long", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_ingested_or_refused(
    tmp_path: Path, report: Report, kind: str, long: bool
) -> None:
    roll = random.Random(int(os.environ.get("LEVER_FUZZ_SEED", "1")))
    whole = KINDS[kind]()
    questions = tmp_path / "whole.json"
    questions.write_bytes(KINDS["questions.json"]())
    seen: Counter[str] = Counter()
    for number in range(3_000 if long else 40):
        path = tmp_path / kind
        path.write_bytes(text := mutate(roll, whole))
        try:
            seen[_ingest(tmp_path / f"s{number % 2}", path, questions)] += 1
        except BaseException as error:
            error.add_note(f"input {number}: {text!r}")
            raise
    report(str(dict(seen)))
    assert seen["refused"] > 0


def _ingest(folder: Path, path: Path, questions: Path) -> str:
    """``ingested`` or ``refused``; whatever is committed is whole."""
    store = Store.create(folder)
    files = [path] if "annotations" not in path.name else [questions, path]
    try:
        made = [
            done.run.run for done in ingest(files, store, IngestOptions(dataset="d", split="train"))
        ]
    except LeverError as error:
        assert error.message()
        made, outcome = [], "refused"
    else:
        outcome = "ingested"
    verify(folder)
    for run in [run.run for run in store.runs()]:
        store.remove(run)
    return outcome if made or outcome == "refused" else "empty"


GIGABYTE = 1 << 30
HUGE = {
    "a text": (b'{"0": {"pointer_candidates": [{"pointer": [1], "gen_method": "', b"a", b'"}]}}'),
    "a number": (b'{"0": {"pointer_candidates": [{"pointer": [1], "beam_score": ', b"9", b"}]}}"),
    "brackets": (b'{"0": {"pointer_candidates": ', b"[", b"}}"),
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", HUGE)
def test_a_value_of_a_gigabyte_is_refused_in_little_memory(
    tmp_path: Path, report: Report, what: str
) -> None:
    head, unit, tail = HUGE[what]
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.write(head)
        for _ in range(GIGABYTE >> 20):
            file.write(unit * (1 << 20))
        file.write(tail)
    words = command("ingest", path, "--store", tmp_path / "s", "--dataset", "d", "--split", "train")
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    megabytes = int(done.stdout.split()[-1]) >> 10
    assert done.returncode == 1 and "Error:" in done.stderr and "Traceback" not in done.stderr
    assert megabytes < 500, megabytes
    report(f"{what}: refused in {time.monotonic() - started:.0f} s and {megabytes} MB")
