"""Hostile files: pickles that would run code or never end, vectors that lie about themselves."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_data.errors import LeverError
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_train.selector.checkpoint import load_selector
from tests.cases import long
from tests.commands import lever
from tests.stores import candidate, commit, new_store


class Evil:
    """Pickles as a call that makes a file; its class is not importable elsewhere."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _evils(marker: Path) -> dict[str, object]:
    import os
    import subprocess

    return {
        "os.system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Evil(subprocess.check_call, ["touch", str(marker)]),
        "open": Evil(open, str(marker), "w"),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "torch.load": Evil(torch.load, str(marker)),
    }


def _zip(path: Path, payload: object, *, protocol: int = 2) -> Path:
    """A file as torch.save writes it, whose pickle is ``payload``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol))
        archive.writestr("archive/version", "3\n")
    return path


def _shapes(evil: object) -> dict[str, object]:
    """Where an attacker would put it: alone, in a state dict, in what a Lightning file keeps."""
    tensors = OrderedDict(w=torch.zeros(2))
    return {
        "alone": evil,
        "in the state dict": {"model_state_dict": {"w": evil}, "epoch": 1},
        "beside it": {"state_dict": dict(tensors), "hyper_parameters": evil, "epoch": 1},
        "as a key": {"state_dict": dict(tensors), "callbacks": [(evil, 1)]},
    }


@pytest.mark.parametrize("name", sorted(_evils(Path("x"))))
def test_a_malicious_pickle_never_runs(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    store = Store.create(tmp_path / "store")
    for shape, payload in _shapes(_evils(marker)[name]).items():
        plain = tmp_path / "plain.pt"
        plain.write_bytes(pickle.dumps(payload, 2))
        for protocol in (2, 4):
            path = _zip(tmp_path / "evil.pt", payload, protocol=protocol)
            for file in (path, plain):
                with pytest.raises(LeverError):
                    list(ingest([file], store, IngestOptions(dataset="d", split="train")))
                with pytest.raises(LeverError):
                    load_selector(file)
        assert not marker.exists(), shape
    assert store.runs() == []


@pytest.mark.slow
def test_commands_refuse_a_malicious_checkpoint(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(q, c, [c, c + 1], correct=c % 2) for q in (0, 1) for c in (0, 1)])
    np.save(tmp_path / "q.npy", np.eye(4, dtype=np.float32))
    marker = tmp_path / "ran"
    evil = _zip(tmp_path / "evil.ckpt", {"state_dict": _evils(marker)["os.system"]})
    words = ["train", "--store", store.path, "--query-embeddings", tmp_path / "q.npy"]
    for argv in (
        ["convert", evil],
        [*words, "--sft-checkpoint", evil, "--out", tmp_path / "out"],
        [*words, "--query-embeddings", evil, "--out", tmp_path / "out"],
    ):
        done = lever(*argv, check=False)
        assert (done.returncode, done.stderr.count("Error: ")) == (1, 1), done.stderr
        assert "Traceback" not in done.stderr
    assert not marker.exists()


def _doubling(depth: int) -> bytes:
    """A pickle of a list that holds itself twice, ``depth`` times: 2**depth entries to walk."""
    body = b"]q\x00" + b"".join(
        b"]q" + bytes([i]) + b"h" + bytes([i - 1]) + b"ah" + bytes([i - 1]) + b"a"
        for i in range(1, depth)
    )
    return b"\x80\x02" + body + b"."


BOMBS: dict[str, Callable[[], bytes]] = {
    "a list that doubles": lambda: _doubling(200),
    "a tuple that doubles as a key": lambda: (
        b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(100)) + b"}h\x00Ns."
    ),
    "deep lists": lambda: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a huge number": lambda: (
        b"\x80\x02\x8b" + struct.pack("<i", 5_000_000) + b"\x7f" * 5_000_000 + b"."
    ),
    "a huge decimal": lambda: b"I" + b"9" * 1_000_000 + b"\n.",
    "a length beyond the end": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "no end": lambda: b"\x80\x02]",
    "not a pickle": lambda: b"\xff" * 1_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [long(n) if n == "deep lists" else n for n in BOMBS])
def test_a_pickle_bomb_ends_quickly(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", BOMBS[name]())
    with pytest.raises(LeverError):
        list(
            ingest(
                [path], Store.create(tmp_path / "store"), IngestOptions(dataset="d", split="train")
            )
        )
    with pytest.raises(LeverError):
        load_selector(path)


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _objects() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Evil(open, "/nonexistent", "w")], dtype=object), allow_pickle=True)
    return out.getvalue()


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


VECTORS: dict[str, Callable[[], bytes]] = {
    "objects.npy": _objects,
    "huge.npy": lambda: _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 40, 512)}"),
    "vast.npy": lambda: _npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 512)}"
    ),
    "negative.npy": lambda: _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}"),
    "code.npy": lambda: _npy("{'descr': '<f4', 'shape': (open('/nonexistent','w'),)}"),
    "short.npy": lambda: _npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}", bytes(8)
    ),
    "strings.npy": lambda: _npy(
        "{'descr': '<U4', 'fortran_order': False, 'shape': (2, 2)}", bytes(64)
    ),
    "long header.safetensors": lambda: struct.pack("<Q", 1 << 60) + b"{}",
    "beyond.safetensors": lambda: _safetensors(
        {"x": {"dtype": "F32", "shape": [1 << 40, 4], "data_offsets": [0, 1 << 44]}}
    ),
    "overlap.safetensors": lambda: _safetensors(
        {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 8]}}, bytes(8)
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_hostile_vectors_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(VECTORS[name]())
    store = Store.create(tmp_path / "store")
    with pytest.raises(LeverError) as caught:
        list(ingest([path], store, IngestOptions(dataset="d", split="train")))
    assert str(path) in caught.value.message()
    assert store.runs() == []
