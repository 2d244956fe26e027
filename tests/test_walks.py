"""How far a newcomer walks: the files that hold one record, and those that name one option."""

from __future__ import annotations

import ast
import json
import sys
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lever_data.options import options
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_train.learn.train import train
from lever_train.options.resolve import resolve
from lever_train.options.train import Source, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("lever_data", "lever_train", "lever_demo", "lever", "cli")
QUERY = 7301  # of the record that is followed; no other number of the file
RECORD_FILES = 15  # three of them know its query's number alone: records, split, census
OPTION_FILES = 4


def _holds(value: object, depth: int = 0) -> bool:
    """Whether a value is the record, or holds it: as text, as rows, as ids or as an object."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f'"{QUERY}"'.encode() in bytes(value)
    if isinstance(value, pa.RecordBatch | pa.Table):
        return "query_id" in value.schema.names and QUERY in value["query_id"].to_pylist()
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.int64 and bool((value == QUERY).any())
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "i" and bool((value == QUERY).any())
    if depth > 2:
        return False
    if isinstance(value, list | tuple):
        return any(_holds(item, depth + 1) for item in value)
    if type(value).__module__.startswith("lever_") and hasattr(value, "__dict__"):
        return any(_holds(item, depth + 1) for item in vars(value).values())
    return value == QUERY if type(value) is int else False


def _is_learned_from(value: object) -> bool:
    """Whether a gradient will flow through it: what the record has become in the selector."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, torch.Tensor) and part.grad_fn is not None for part in parts)


@cache
def _file_of(name: str) -> str | None:
    """A file of lever by its place in the checkout; ``None``: of something else."""
    file = Path(name).resolve()
    inside = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in TOPS
    return str(file.relative_to(ROOT)) if inside else None


class Walk:
    """The files of lever whose functions are given the record, return it or hold it in a name."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "return":
            self._look(frame, [result])
        elif event == "call" and self._look(frame, []):
            self._look(frame.f_back, [])  # a loop's own names live on when it returns

    def _look(self, frame: FrameType | None, results: list[object]) -> bool:
        name = None if frame is None else _file_of(frame.f_code.co_filename)
        if frame is None or name is None:
            return False
        # of an object that outlives the record only what it is given counts, not what it keeps
        own = frame.f_locals
        given = [*results, *(v for name, v in own.items() if name != "self")]
        if not any(_holds(v) or _is_learned_from(v) for v in given):
            return False
        if name not in self.files:
            self.files.append(name)
        return True

    def __enter__(self) -> Walk:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def _record(query: int) -> dict[str, Any]:
    common = {"gen_method": "beam", "beam_rank": 0, "beam_score": -0.1, "logprob_score": -1.0}
    right, wrong = (
        {"pointer": pointer, **common, "vqa_pred_answer": "a cat", "vqa_correct": correct}
        | {"vqa_acc_score": float(correct), "vqa_eval_mode": "file"}
        for pointer, correct in (([1, query % 5 + 2], 1), ([2, 1], 0))
    )
    return {"pointer_candidates": [right, wrong]}


@pytest.mark.long
def test_the_walk_of_a_record_from_json_to_the_gradient(tmp_path: Path) -> None:
    # it stands behind what is read to tell what kind of file this is
    queries = [*range(7000, 7100), QUERY, *range(8000, 8003)]
    rl_data, vectors = tmp_path / "rl_data.json", tmp_path / "vectors.pt"
    rl_data.write_text(json.dumps({str(query): _record(query) for query in queries}))
    torch.save(torch.randn(8003, 6), vectors)
    store = Store.create(tmp_path / "store")
    config = resolve(
        None,
        {
            "data.query_embeddings": str(vectors),
            "data.split_ratio": 1.0,
            "model.hidden": 8,
            "run.batch_size": 64,
            "run.threads": 1,
            "rce.epochs": 1,
        },
    )
    with Walk() as walk:
        list(ingest([rl_data], store, IngestOptions(dataset="d", split="train")))
        to_parquet = len(walk.files)
        train(Source(store=store.path), tmp_path / "out", config)
    said = f"{to_parquet} to Parquet, {len(walk.files) - to_parquet} to the gradient: {walk.files}"
    assert "lever_data/sources/rl.py" in walk.files[:to_parquet], said
    assert "lever_train/learn/losses.py" in walk.files[to_parquet:], said
    assert len(walk.files) <= RECORD_FILES, said


@cache
def _named() -> dict[str, set[str]]:
    """Every name the code says, as an attribute, a keyword, a field or a text: its files."""
    files: dict[str, set[str]] = defaultdict(set)
    for top in TOPS:
        for file in (ROOT / top).rglob("*.py"):
            where = str(file.relative_to(ROOT))
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    files[node.attr].add(where)
                elif isinstance(node, ast.keyword) and node.arg:
                    files[node.arg].add(where)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    files[node.target.id].add(where)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    files[node.value].add(where)
    return files


@pytest.mark.slow
@pytest.mark.parametrize("section", ["rce", "grpo", "dense"])
def test_the_walk_of_an_option_from_flag_to_use(section: str) -> None:
    """What all options share (flags.py, options.py, resolve.py) names none of them."""
    common = {"epochs", "lr", "rank", "temperature", "weight_decay"}  # of several sections
    named = _named()
    walks = {
        option.dotted: named[option.keys[-1]]
        | named[option.dotted]
        | named[option.flag.split("/")[0]]
        for option in options(TrainConfig)
        if option.keys[0] == section and option.keys[-1] not in common
    }
    assert walks
    for option, files in walks.items():
        assert "lever_train/options/train.py" in files
        assert 2 <= len(files) <= OPTION_FILES, f"{option}: {sorted(files)}"
