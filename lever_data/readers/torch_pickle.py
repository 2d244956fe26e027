"""Read the pickle inside a torch file without running it: names stay inert.

In goes pickle bytes; out come dicts, lists, tuples, numbers, strings, and whatever the caller
makes of the few names it allows. Nothing a file names is imported or looked up, and nothing is
called but the caller's own functions: every other name becomes a :class:`Placeholder`.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lever_data.errors import LeverError

Rebuild = Callable[[tuple[Any, ...]], Any]


@dataclass(eq=False)
class Placeholder:
    """What a file says about an object of a class we do not know; it does nothing.

    Attributes:
        name: the class or function it names, as ``module.name``.
        args: the arguments it would be called with; ``None`` for the bare name.
        state: what it would be given as its state.
        items: mapping items set on it; entries: list items appended to it.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Take an item that would be appended."""
        self.entries.append(value)


class DamagedError(ValueError):
    """The pickle is damaged, or uses what torch never writes."""


# The standard unpickler as Python has it: that in C takes 32 GB for one number (the index of a
# memo), and cannot be told which keys not to hash.
_Unpickler: Any = pickle._Unpickler
_KEYS = (str, bytes, int, float, bool, type(None), Placeholder)
# What torch never writes: calls of other forms, copyreg's extensions, buffers outside the pickle
# (a bytearray of 2^63 bytes would be made before its bytes are missed).
_NO_PLACE = (
    *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
_FAULTS = (
    *(pickle.UnpicklingError, LookupError, TypeError, ValueError, OverflowError),
    *(AttributeError, AssertionError, EOFError, struct.error),
)


class Machine(_Unpickler):  # type: ignore[misc]
    """Runs one pickle: the standard unpickler, without its ways to foreign code.

    Args:
        allowed: ``module.name`` → what to make of its arguments.
        persistent: makes the value of a persistent id (a storage).
        unknown: ``error`` refuses names that are not allowed, ``placeholder`` keeps them inert.
        fill: gives a state to what the caller made; that of a dict (_metadata) carries no tensor.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: step
        for code, step in _Unpickler.dispatch.items()
        if code not in {opcode[0] for opcode in _NO_PLACE}
    }

    def __init__(
        self,
        allowed: dict[str, Rebuild],
        persistent: Callable[[Any], Any],
        unknown: str,
        fill: Callable[[Any, Any], None],
    ) -> None:
        self._allowed = allowed
        self._unknown = unknown
        self._fill = fill
        self.persistent_load = persistent

    def run(self, data: bytes) -> object:
        """The object the pickle describes.

        Raises:
            DamagedError: the pickle cannot be read.
            LeverError: it names something that is not allowed.
        """
        super().__init__(io.BytesIO(data), encoding="latin1")
        try:
            return self.load()
        except _FAULTS as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from None

    def find_class(self, module: str, name: str) -> Placeholder:
        """A name of the file, as a name."""
        full = f"{module}.{name}"
        if full not in self._allowed and self._unknown == "error":
            raise LeverError(
                "the file names something that is not a tensor",
                value=full,
                hint="lever imports nothing a file names; save the bare tensor instead",
            )
        return Placeholder(full)

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Placeholder) or not isinstance(args, tuple):
            raise DamagedError("a call of something that is not a name")
        rebuild = self._allowed.get(function.name) if function.args is None else None
        return Placeholder(function.name, args) if rebuild is None else rebuild(args)

    def load_reduce(self) -> None:
        """Ask the caller's table in place of calling a function, or making an object."""
        args = self.stack.pop()
        self.append(self._call(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        """Likewise, with keywords."""
        keywords = self.stack.pop()
        self.load_reduce()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].items.update(keywords)

    def load_build(self) -> None:
        """Keep the state of a placeholder; what the caller made is the caller's to fill."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state
        else:
            self._fill(self.stack[-1], state)

    def load_setitem(self) -> None:
        """Set one item."""
        _require_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Set the items behind the mark."""
        _require_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """Make a dict of the items behind the mark."""
        _require_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        """Add the items behind the mark to a set."""
        _require_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        """Make a set of the items behind the mark."""
        _require_keys(self.stack)
        super().load_frozenset()

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }


def _require_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that are not plain values: hashing a nested tuple may take forever."""
    for key in keys:
        flat = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, _KEYS) for part in flat):
            raise DamagedError(f"a dict key of type {type(key).__name__}")
