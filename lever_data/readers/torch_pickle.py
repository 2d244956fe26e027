"""Read the pickle inside a torch file without running it: an interpreter for inert values.

In goes pickle bytes; out come dicts, lists, tuples, numbers, strings, and whatever the caller
makes of the few names it allows. A name the caller does not allow becomes a :class:`Placeholder`;
nothing a file names is imported, looked up or called, because this machine has no instruction
that could: ``REDUCE`` and its kin only ask the caller's table.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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


class DamagedError(ValueError):
    """The pickle is damaged, or uses what torch never writes."""


class _Mark:
    """The mark that opens a list of arguments on the stack."""


_MARK = _Mark()
_SCALARS = (str, bytes, int, float, bool, type(None), Placeholder)
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_UNICODES = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_PUSH = frozenset((*_NUMBERS, *_TEXTS, *_UNICODES))
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NOTHING = frozenset({"PROTO", "FRAME"})


class Machine:
    """Runs one pickle.

    Args:
        allowed: ``module.name`` → what to make of its arguments.
        persistent: makes the value of a persistent id (a storage).
        unknown: ``error`` refuses names that are not allowed, ``placeholder`` keeps them inert.
    """

    def __init__(
        self, allowed: dict[str, Rebuild], persistent: Callable[[Any], Any], unknown: str
    ) -> None:
        self._allowed = allowed
        self._persistent = persistent
        self._unknown = unknown
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        """The object the pickle describes.

        Raises:
            DamagedError: the pickle cannot be read.
            LeverError: it names something that is not allowed.
        """
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self._plain(self._stack.pop())
                self._step(opcode.name, argument)
        except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from None
        raise DamagedError("it does not end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSH:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name not in _NOTHING:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise DamagedError(f"the instruction {name} has no place in a torch file")
            handler(self, argument)

    def _plain(self, value: Any) -> Any:
        if value is _MARK:
            raise DamagedError("a mark in place of a value")
        return value

    def _pop(self) -> Any:
        return self._plain(self._stack.pop())

    def _drop(self, count: int) -> None:
        del self._stack[-count:]

    def _drop_to_mark(self) -> None:
        self._to_mark()

    def _to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise DamagedError("a mark is missing")

    def _name(self, module: object, name: object) -> None:
        full = f"{module}.{name}"
        if full not in self._allowed and self._unknown == "error":
            raise LeverError(
                "the file names something that is no tensor",
                value=full,
                hint="lever imports nothing a file names; save the bare tensor instead",
            )
        self._stack.append(Placeholder(full))

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Placeholder) or not isinstance(args, tuple):
            raise DamagedError("a call of something that is no name")
        rebuild = self._allowed.get(function.name) if function.args is None else None
        return Placeholder(function.name, args) if rebuild is None else rebuild(args)

    def _memoize(self, key: int | None) -> None:
        self._memo[len(self._memo) if key is None else key] = self._plain(self._stack[-1])

    def _reduce(self) -> None:
        args = self._pop()
        self._stack.append(self._call(self._pop(), args))

    def _new(self, has_keywords: bool) -> None:
        keywords = self._pop() if has_keywords else {}
        args = self._pop()
        made = self._call(self._pop(), args)
        if isinstance(made, Placeholder):
            made.items.update(keywords)
        self._stack.append(made)

    def _build(self) -> None:
        state = self._pop()
        target = self._plain(self._stack[-1])
        if isinstance(target, Placeholder):
            target.state = state
        # An OrderedDict with attributes (a state dict's _metadata): they carry no tensor.

    def _append(self, items: list[Any]) -> None:
        target = self._plain(self._stack[-1])
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        elif isinstance(target, Placeholder):
            target.entries.extend(items)
        else:
            raise DamagedError("items are added to no list")

    def _set_items(self, items: list[Any]) -> None:
        target = self._plain(self._stack[-1])
        if isinstance(target, Placeholder):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise DamagedError("items are set on no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _persist(self, identity: Any) -> None:
        self._stack.append(self._persistent(identity))


def _key(value: Any) -> Any:
    """A dict key; nested tuples are refused, since hashing them may take forever."""
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, _SCALARS) for part in flat):
        raise DamagedError(f"a dict key of type {type(value).__name__}")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(k): v for k, v in zip(items[::2], items[1::2], strict=True)}


def _last(machine: Machine, count: int) -> tuple[Any, ...]:
    return tuple(machine._pop() for _ in range(count))[::-1]


def _dotted(argument: str) -> tuple[str, str]:
    module, name = argument.split(" ", 1)
    return module, name


# What each instruction does; those that only push a value stand in the tables above.
_HANDLERS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": lambda m, _: m._stack.append(_MARK),
    "POP": lambda m, _: m._drop(1),
    "POP_MARK": lambda m, _: m._drop_to_mark(),
    "DUP": lambda m, _: m._stack.append(m._plain(m._stack[-1])),
    "EMPTY_TUPLE": lambda m, _: m._stack.append(()),
    "TUPLE": lambda m, _: m._stack.append(tuple(m._to_mark())),
    "TUPLE1": lambda m, _: m._stack.append(_last(m, 1)),
    "TUPLE2": lambda m, _: m._stack.append(_last(m, 2)),
    "TUPLE3": lambda m, _: m._stack.append(_last(m, 3)),
    "LIST": lambda m, _: m._stack.append(m._to_mark()),
    "DICT": lambda m, _: m._stack.append(_pairs(m._to_mark())),
    "FROZENSET": lambda m, _: m._stack.append(frozenset(map(_key, m._to_mark()))),
    "APPEND": lambda m, _: m._append([m._pop()]),
    "APPENDS": lambda m, _: m._append(m._to_mark()),
    "ADDITEMS": lambda m, _: m._append(m._to_mark()),
    "SETITEM": lambda m, _: m._set_items(list(_last(m, 2))),
    "SETITEMS": lambda m, _: m._set_items(m._to_mark()),
    "GET": lambda m, key: m._stack.append(m._memo[int(key)]),
    "BINGET": lambda m, key: m._stack.append(m._memo[key]),
    "LONG_BINGET": lambda m, key: m._stack.append(m._memo[key]),
    "PUT": lambda m, key: m._memoize(int(key)),
    "BINPUT": lambda m, key: m._memoize(key),
    "LONG_BINPUT": lambda m, key: m._memoize(key),
    "MEMOIZE": lambda m, _: m._memoize(None),
    "GLOBAL": lambda m, name: m._name(*_dotted(name)),
    "STACK_GLOBAL": lambda m, _: m._name(*_last(m, 2)),
    "REDUCE": lambda m, _: m._reduce(),
    "NEWOBJ": lambda m, _: m._new(has_keywords=False),
    "NEWOBJ_EX": lambda m, _: m._new(has_keywords=True),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._persist(m._pop()),
}
