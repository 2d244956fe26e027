"""Torch files without torch: the same numbers, inert placeholders, and no code ever run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_data.errors import LeverError
from lever_data.readers.torch_file import Placeholder, read_torch
from tests.shared_data import GOLDEN, needs_shared

TYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def save(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().numpy()


def same(found: object, expected: object) -> bool:
    """Equality of structures with arrays on the left and tensors on the right."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, np.ndarray)
        wanted = as_numpy(expected)
        return found.dtype == wanted.dtype and np.array_equal(found, wanted, equal_nan=True)
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        assert isinstance(found, type(expected))
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_type_of_tensor(kind: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) - 7).to(kind)
    assert same(read_torch(save(tensor, tmp_path / "t.pt")), tensor)


def test_views_shared_storages_and_containers(tmp_path: Path) -> None:
    base = torch.arange(20, dtype=torch.float32)
    value = {
        "base": base,
        "strided": base.reshape(4, 5)[1:, ::2],
        "transposed": base.reshape(4, 5).T,
        "expanded": base[:1].expand(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[:2]),
        "state": torch.nn.Linear(2, 3).state_dict(),
        "plain": [1, -(2**70), 2.5, None, True, "ü", b"x", (1, (2,)), {"a": OrderedDict(b=1)}],
        "size": base.reshape(4, 5).shape,
    }
    found = read_torch(save(value, tmp_path / "t.pt"))
    assert same(found, {**value, "size": (4, 5)})


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<f2", "<i8", "|u1", "|b1"])
def test_numpy_arrays_in_a_torch_file_are_arrays(kind: str, tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    path = save({"x": array, "t": np.asfortranarray(array), "n": array[1, 1]}, tmp_path / "t.pth")
    found: Any = read_torch(path)
    assert found["x"].dtype == array.dtype
    assert np.array_equal(found["x"], array)
    assert np.array_equal(found["t"], array)
    assert found["n"] == array[1, 1]


@pytest.mark.parametrize(
    "state",
    [
        (1, (2**39, 3), np.dtype("f4"), False, b""),
        (1, (2, -3), np.dtype("f4"), False, b""),
        (1, (2,), np.dtype("f4"), False, b"1234"),
        (1, (1,), np.dtype("O"), False, [1]),
        (1, (1,), np.dtype([("a", "O")]), False, b"12345678"),
        (1, 3, 5),
        (1, (1,), np.dtype(">f4"), False, b"1234"),
    ],
)
def test_a_numpy_array_that_lies_about_itself_is_damaged(state: Any, tmp_path: Path) -> None:
    class Liar:
        def __reduce__(self) -> Any:
            return np.ndarray((0,), np.uint8).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    with pytest.raises(LeverError, match=r"damaged|names something that is not a tensor"):
        read_torch(packed(tmp_path / "x.pt", pickle.dumps(Liar(), protocol=2)))


@needs_shared
@pytest.mark.parametrize("name", ["selector_k64_s2_l1", "selector_k20_s4_l3"])
def test_golden_checkpoints_are_what_torch_reads(name: str) -> None:
    for path in (GOLDEN / f"{name}.v3.pt", GOLDEN / f"{name}.v2_lightning.ckpt"):
        assert same(read_torch(path), torch.load(path, weights_only=True))


@needs_shared
def test_a_full_lightning_checkpoint_loads_with_inert_placeholders() -> None:
    path = GOLDEN / "selector_k64_s2_l1.v2_full.ckpt"
    with pytest.raises(LeverError, match=r"names something that is not a tensor; at .*omegaconf"):
        read_torch(path)
    found: Any = read_torch(path, unknown="placeholder")
    plain = torch.load(GOLDEN / "selector_k64_s2_l1.v2_lightning.ckpt", weights_only=True)
    assert same(dict(found["state_dict"]), dict(plain["state_dict"]))
    config = found["hyper_parameters"]["cfg"]
    assert isinstance(config, Placeholder)
    assert config.name == "omegaconf.dictconfig.DictConfig"


class Malicious:
    """Pickles to a call of whatever it is given."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def packed(path: Path, data: bytes) -> Path:
    """A zip file as torch writes them, with this pickle in it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickles_run_nothing(protocol: int, tmp_path: Path) -> None:
    import os

    target = tmp_path / "was_here"
    attacks: list[Any] = [
        Malicious(os.system, f"touch {target}"),
        Malicious(open, str(target), "w"),
        Malicious(eval, f"open({str(target)!r}, 'w')"),
        {"a": [Malicious(exec, f"open({str(target)!r}, 'w')")]},
        Malicious(getattr, Malicious(__import__, "os"), "system"),
    ]
    for attack in attacks:
        path = packed(tmp_path / "evil.pt", pickle.dumps(attack, protocol=protocol))
        with pytest.raises(LeverError):
            read_torch(path)
        read_torch(path, unknown="placeholder")
        assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # a call
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x82\x01.",  # an extension code
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2^63 bytes
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string of 2^63 bytes
        b".",
        b"",
        b"(((((",
        b"h\x05.",
        b"]" * 100 + b"a" * 99 + b".",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"Qabc.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 2^63 bytes
        b"Nr\xff\xff\xff\x7f.",  # place 2^31 of the memo: 32 GB where it is a list
        b"})" + b"2\x86" * 60 + b"Ns.",  # a dict key whose hash takes 2^60 steps
        b"(" + b")" + b"2\x86" * 60 + b"\x91.",  # and an item of a frozen set
    ],
)
@pytest.mark.parametrize("unknown", ["error", "placeholder"])
def test_damaged_pickles_are_errors_or_inert(data: bytes, unknown: Any, tmp_path: Path) -> None:
    try:
        read_torch(packed(tmp_path / "x.pt", data), unknown=unknown)
    except LeverError as error:
        assert str(tmp_path) in str(error.where)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_byte_changed_in_a_file_goes_unnoticed_or_crashes(data: st.DataObject) -> None:
    import tempfile

    buffer = io.BytesIO()
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "n": 1}, buffer)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        file.flush()
        try:
            found: Any = read_torch(file.name)
        except LeverError:
            return
    assert isinstance(found, dict)
    assert np.array_equal(found["w"], np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("offset", [1 << 20, (1 << 63) + 5])
def test_a_record_outside_the_file_is_refused(tmp_path: Path, offset: int) -> None:
    """Found by the test above: zip64 has room for more than C's signed integers."""
    torch.save(torch.arange(4.0), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as file:
        entries = {i.filename: file.read(i) for i in file.infolist()}
    with zipfile.ZipFile(tmp_path / "u.pt", "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, content)
        file.getinfo(next(n for n in entries if n.endswith("/byteorder"))).header_offset = offset
    with pytest.raises(LeverError, match="byteorder begins outside the file"):
        read_torch(tmp_path / "u.pt")


def test_tensors_beyond_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(4.0), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as file:
        entries = {i.filename: file.read(i) for i in file.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    # BININT1 4 as the only size; a larger size, an offset, a stride reach beyond
    for old, new in ((b"K\x04\x85", b"K\x05\x85"), (b"QK\x00K\x04\x85", b"QK\x01K\x04\x85")):
        assert entries[name].count(old) == 1
        changed = {**entries, name: entries[name].replace(old, new)}
        with zipfile.ZipFile(tmp_path / "u.pt", "w") as file:
            for entry, data in changed.items():
                file.writestr(entry, data)
        with pytest.raises(LeverError, match="beyond its storage"):
            read_torch(tmp_path / "u.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes(pickle.dumps([1])), "not a torch file of the zip format"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "not one that torch.save wrote"),
        (lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), p), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_of_other_kinds_are_named(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "x.pt")
    with pytest.raises(LeverError, match=message):
        read_torch(tmp_path / "x.pt")
