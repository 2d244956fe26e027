"""Read torch files (``.pt``, ``.ckpt``) into numpy, without torch and without running their code.

In goes the path of a zip file as ``torch.save`` has written it since 1.6; out comes the object in
it, every tensor a numpy array. bfloat16 becomes float32, which holds it exactly. Format: torch
``caffe2/serialize/inline_container.h`` (``<name>/data.pkl`` and ``<name>/data/<key>``, stored
uncompressed).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from lever_data.errors import LeverError, reason
from lever_data.readers.torch_pickle import DamagedError, Machine, Placeholder, Rebuild

__all__ = ["Placeholder", "read_torch"]

_DTYPES = {
    "HalfStorage": "f2",
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "BFloat16Storage": "bf",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "ShortStorage": "i2",
    "IntStorage": "i4",
    "LongStorage": "i8",
    "BoolStorage": "b1",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
}
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2, and since
_MAX_EXPANDED = 1 << 28  # elements of a view that repeats its storage (stride 0)
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class _Storage:
    """A flat array of numbers that tensors view; ``values`` maps the file, read-only."""

    values: np.ndarray
    is_bfloat16: bool


def read_torch(
    path: str | Path, *, unknown: Literal["error", "placeholder"] = "error", copy: bool = True
) -> object:
    """The object in a torch file, its tensors as numpy arrays.

    Args:
        path: the file.
        unknown: what becomes of classes and functions the file names beside tensors and plain
            containers: an error, or inert :class:`Placeholder` objects.
        copy: False leaves arrays as read-only views of the mapped file.

    Raises:
        LeverError: no torch zip file, damaged (checksums are verified), or, with
            ``unknown="error"``, it names something else; the name is the error's value.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            archive = _Archive(mapped, zipfile.ZipFile(handle))
            machine = Machine(_allowed(copy), archive.storage, unknown, _fill)
            return machine.run(archive.read("data.pkl"))
    except LeverError as error:
        raise LeverError(error.what, where=str(path), value=error.value, hint=error.hint) from error
    except zipfile.BadZipFile:
        raise LeverError(
            "this is not a torch file of the zip format",
            where=str(path),
            hint="files of torch before 1.6, and plain pickles, are not read: load and save it "
            "again with a newer torch",
        ) from None
    except (DamagedError, struct.error, EOFError, NotImplementedError) as error:
        # the last is what zipfile says to a compression it does not know
        raise LeverError(f"the torch file is damaged ({error})", where=str(path)) from None
    except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
        raise LeverError(
            f"the torch file cannot be read ({reason(error)})", where=str(path)
        ) from None


class _Archive:
    """The records of a torch zip file."""

    def __init__(self, mapped: mmap.mmap, archive: zipfile.ZipFile) -> None:
        self._mapped = mapped
        self._entries = {info.filename: info for info in archive.infolist()}
        pickles = [n for n in self._entries if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise LeverError("a zip file, but not one that torch.save wrote", value=sorted(pickles))
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._entries:
            raise LeverError("a TorchScript program, not a file of tensors")
        order = self._root + "byteorder"
        is_big = order in self._entries and self.read("byteorder") == b"big"
        self._order: Literal[">", "<"] = ">" if is_big else "<"
        self._storages: dict[str, _Storage] = {}

    def read(self, name: str) -> bytes:
        return bytes(self._view(name))

    def storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id ('storage', type, key, location, numel)."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise DamagedError("a persistent id that is not a storage")
        _, kind, key, _, count = identity
        if not (isinstance(kind, Placeholder) and isinstance(key, str) and isinstance(count, int)):
            raise DamagedError("a storage of another form")
        if key not in self._storages:
            name = kind.name.removeprefix("torch.storage.").removeprefix("torch.")
            if name not in _DTYPES:
                raise LeverError("tensors of this type are not read", value=kind.name)
            self._storages[key] = self._map(key, _DTYPES[name], count)
        return self._storages[key]

    def _map(self, key: str, code: str, count: int) -> _Storage:
        is_bfloat16 = code == "bf"
        dtype = np.dtype("u2" if is_bfloat16 else code).newbyteorder(self._order)
        view = self._view(f"data/{key}")
        if len(view) != count * dtype.itemsize:
            raise DamagedError(f"storage {key} holds {len(view)} bytes, not {count} numbers")
        return _Storage(np.frombuffer(view, dtype), is_bfloat16)

    def _view(self, name: str) -> memoryview:
        """A record's bytes, checked against its checksum."""
        info = self._entries.get(self._root + name)
        if info is None:
            raise DamagedError(f"the record {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise DamagedError(f"the record {name} is compressed or encrypted")
        start = info.header_offset
        if not 0 <= start <= len(self._mapped) - _LOCAL_HEADER:
            raise DamagedError(f"the record {name} begins outside the file")
        name_length, extra_length = struct.unpack_from("<HH", self._mapped, start + 26)
        start += _LOCAL_HEADER + name_length + extra_length
        view = memoryview(self._mapped)[start : start + info.file_size]
        if len(view) != info.file_size or zlib.crc32(view) != info.CRC:
            raise DamagedError(f"the record {name} does not match its checksum")
        return view


def _allowed(copy: bool) -> dict[str, Rebuild]:
    """What becomes of the names a torch file may use; all other names stay inert."""

    def tensor(args: tuple[Any, ...]) -> np.ndarray:
        return _rebuild(*args[:4], copy=copy)

    def typed(args: tuple[Any, ...]) -> object:
        function, _, inner = args[:3]
        if isinstance(function, Placeholder) and function.name == "torch._utils._rebuild_tensor_v2":
            return tensor(inner)
        raise DamagedError("a tensor of a class of its own")

    return {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_parameter": lambda args: args[0],
        "torch._tensor._rebuild_from_type_v2": typed,
        "collections.OrderedDict": _ordered,
        "_codecs.encode": _latin1,
        **{f"{core}._reconstruct": _new_array for core in _NUMPY},
        **{f"{core}.scalar": _scalar for core in _NUMPY},
        "numpy.ndarray": _refuse,
        "numpy.dtype": _dtype,
        "torch.Size": lambda args: tuple(args[0]),
        "torch.nn.parameter.Parameter": lambda args: args[0],
        "torch.Tensor": lambda args: args[0],
        **{f"torch.{name}": _refuse for name in _DTYPES},
        **{f"torch.storage.{name}": _refuse for name in _DTYPES},
    }


def _ordered(args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    pairs = args[0] if args else []
    if not isinstance(pairs, list):
        raise DamagedError("an OrderedDict of something that is not a list")
    made: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise DamagedError("an OrderedDict key")
        made[key] = value
    return made


def _latin1(args: tuple[Any, ...]) -> bytes:
    """How old pickle protocols write bytes."""
    text, coding = args
    if not isinstance(text, str) or coding != "latin1":
        raise DamagedError("bytes of an unknown coding")
    return text.encode("latin1")


def _dtype(args: tuple[Any, ...]) -> np.dtype[Any]:
    """A type of numbers; numpy's other types can hold anything."""
    if not isinstance(args[0], str) or re.fullmatch(r"[fiub][1248]", args[0]) is None:
        raise DamagedError("an array of something that is not a number")
    return np.dtype(args[0])


def _new_array(args: tuple[Any, ...]) -> np.ndarray:
    """An empty array of numpy's, for ``_fill``."""
    return np.empty(0, np.uint8)


def _scalar(args: tuple[Any, ...]) -> object:
    kind, data = args
    return np.frombuffer(data, kind, 1)[0]


def _fill(target: object, state: object) -> None:
    """Give an array of numpy's its shape, type and numbers; other states carry no tensor.

    numpy would take the state as it comes: it is checked here.
    """
    if isinstance(target, np.dtype) and isinstance(state, tuple) and ">" in state:
        raise DamagedError("a numpy array of the other byte order")
    if not isinstance(target, np.ndarray) or target.base is not None or target.size:
        return
    if not isinstance(state, tuple) or len(state) != 5:
        raise DamagedError("a numpy array of another form")
    _, shape, kind, is_fortran, data = state
    sizes = _numbers(shape)
    if not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in sizes) or len(sizes) > 32:
        raise DamagedError("a numpy array of impossible shape")
    if not isinstance(kind, np.dtype) or not isinstance(data, bytes):
        raise DamagedError("a numpy array of something that is not a number")
    if math.prod(sizes) * kind.itemsize != len(data):
        raise DamagedError(f"a numpy array {list(sizes)} of {len(data)} bytes")
    target.__setstate__((1, sizes, kind, bool(is_fortran), data))  # type: ignore[arg-type]


def _refuse(args: tuple[Any, ...]) -> object:
    raise DamagedError("a storage is called")


def _rebuild(
    storage: object, offset: object, size: object, stride: object, *, copy: bool
) -> np.ndarray:
    """A tensor's view of its storage; bounds are checked before numpy sees them."""
    if not isinstance(storage, _Storage):
        raise DamagedError("a tensor without a storage")
    numbers = [offset, *_numbers(size), *_numbers(stride)]
    if len(_numbers(size)) != len(_numbers(stride)) or any(
        not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers
    ):
        raise DamagedError("a tensor of impossible shape")
    shape, strides = cast("tuple[int, ...]", size), cast("tuple[int, ...]", stride)
    start, values = cast(int, offset), storage.values
    if math.prod(shape) > max(len(values), _MAX_EXPANDED) or len(shape) > 32:
        raise DamagedError("a tensor larger than its storage")
    if 0 in shape:
        return np.zeros(shape, np.float32 if storage.is_bfloat16 else values.dtype)
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(values):
        raise DamagedError("a tensor reaches beyond its storage")
    item = values.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        values[start:], shape, [step * item for step in strides], writeable=False
    )
    if storage.is_bfloat16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    native = view.dtype.newbyteorder("=")
    return np.array(view, dtype=native, order="C") if copy else view.astype(native, copy=False)


def _numbers(value: object) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise DamagedError("a tensor of impossible shape")
    return value
