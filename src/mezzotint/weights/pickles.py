"""Read a pickle as data: nothing is imported or called, whatever the pickle says.

Python's unpickler imports the objects that a pickle names and calls them. This reader has a stack and a memo as well,
but a name is a `Global`, and a call of one is an `Object` that holds its arguments; the caller interprets them. Opcodes
without a method of `_Machine` are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

MAX_PICKLE_BYTES = 16_000_000  # bytes; that of SD 1.4, with its EMA weights, has 0.4 MB
MAX_OPCODES = 200_000  # a tensor needs about 40
MAX_DIGITS = 40  # of a number


class Global(NamedTuple):
    """The name of a class or function, which is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


Key = str | int
Call = Callable[[Global, tuple[Any, ...]], Any]
MARK = object()


class Object:
    """The object that a pickle would create by calling `function`: arguments, state, and items if it is a mapping."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Global, arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.state: Any = None
        self.items: dict[Key, Any] = {}


class ForbiddenError(ValueError):
    """The pickle names a class or function that is not on the caller's list."""

    def __init__(self, found: Global) -> None:
        super().__init__(str(found))


def read_pickle(
    data: BytesIO, is_allowed: Callable[[Global], bool], call: Call = Object, refer: Callable[[Any], Any] | None = None
) -> Any:
    """Read the pickle at the position of `data`, which is then after it.

    Args:
        data: The bytes, at most MAX_PICKLE_BYTES.
        is_allowed: Whether a name may occur.
        call: Returns what stands for a call of a name.
        refer: Returns what stands for a persistent id: a storage, in a PyTorch file.

    Returns:
        Numbers, strings, bytes, tuples, lists (sets too), dictionaries, `Global`, and what `call` and `refer` return.
        Only strings and numbers are keys of a dictionary; other entries are left out.

    Raises:
        ForbiddenError: If it has a name that is not allowed.
        ValueError: If it is damaged, or has an unknown opcode.
    """
    machine = _Machine(is_allowed, call, refer)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_OPCODES:
                raise ValueError(f"it has more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"its opcodes do not fit together: {type(error).__name__}") from None
    raise ValueError("it has no end")


class _Machine:
    """The stack and the memo."""

    def __init__(self, is_allowed: Callable[[Global], bool], call: Call, refer: Callable[[Any], Any] | None) -> None:
        self._is_allowed = is_allowed
        self._call = call
        self._refer = refer
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Perform one opcode."""
        if opcode in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > 3 * MAX_DIGITS:
                raise ValueError("it has a number of too many digits")
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            make = _CONSTANTS[opcode]
            self._stack.append(make() if isinstance(make, type) else make)
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            parts = self._stack[-count:]
            if len(parts) < count or MARK in parts:
                raise ValueError("it takes a mark for a value")
            self._stack[-count:] = (tuple(parts),)
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self._top()
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[int(argument)])
        elif opcode not in ("PROTO", "FRAME"):
            method = _METHODS.get(opcode)
            if method is None:
                raise ValueError(f"it has the opcode {opcode}")
            method(self, argument)

    def pop(self) -> Any:
        """Take the top of the stack, which must not be a mark."""
        top = self._top()
        del self._stack[-1]
        return top

    def _top(self) -> Any:
        if self._stack[-1] is MARK:
            raise ValueError("it takes a mark for a value")
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        taken: list[Any] = []
        while self._stack[-1] is not MARK:
            taken.append(self._stack.pop())
        self._stack.pop()
        return taken[::-1]

    def _find(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it has a name that is not a string")
        found = Global(module, name)
        if not self._is_allowed(found):
            raise ForbiddenError(found)
        return found

    def _made(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls an object that is not a named function")
        return self._call(function, arguments)

    def _fill(self, pairs: list[Any]) -> None:
        target = self._top()
        items = target.items if isinstance(target, Object) else target
        if not isinstance(items, dict) or len(pairs) % 2:
            raise ValueError("it stores an item in an object that is not a dictionary")
        items |= _table(pairs)

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target += values
        elif not isinstance(target, Object):
            raise ValueError("it appends to an object that is not a list")

    def mark(self, _: None) -> None:
        self._stack.append(MARK)

    def pop_one(self, _: None) -> None:
        del self._stack[-1]

    def pop_mark(self, _: None) -> None:
        self._marked()

    def duplicate(self, _: None) -> None:
        self._stack.append(self._top())

    def memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top()

    def marked_list(self, _: None) -> None:
        self._stack.append(self._marked())

    def marked_tuple(self, _: None) -> None:
        self._stack.append(tuple(self._marked()))

    def marked_dict(self, _: None) -> None:
        self._stack.append(_table(self._marked()))

    def append(self, _: None) -> None:
        value = self.pop()
        self._append([value])

    def appends(self, _: None) -> None:
        values = self._marked()
        self._append(values)

    def set_item(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self._fill([key, value])

    def set_items(self, _: None) -> None:
        pairs = self._marked()
        self._fill(pairs)

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._find(module, name))

    def name_from_stack(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self._stack.append(self._find(module, name))

    def call(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        self._stack.append(self._made(function, arguments))

    def call_with_keywords(self, _: None) -> None:
        self.pop()
        self.call(None)

    def call_marked(self, _: None) -> None:
        function, *arguments = self._marked()
        self._stack.append(self._made(function, tuple(arguments)))

    def call_named(self, argument: str) -> None:
        arguments = self._marked()
        module, _, name = argument.partition(" ")
        self._stack.append(self._made(self._find(module, name), tuple(arguments)))

    def build(self, _: None) -> None:
        state, target = self.pop(), self._top()
        if isinstance(target, Object):
            target.state = state

    def persistent(self, _: None) -> None:
        if self._refer is None:
            raise ValueError("it refers to an object outside the file")
        self._stack.append(self._refer(self.pop()))


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop_one,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memoize,
    "LIST": _Machine.marked_list,
    "FROZENSET": _Machine.marked_list,
    "TUPLE": _Machine.marked_tuple,
    "DICT": _Machine.marked_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "OBJ": _Machine.call_marked,
    "INST": _Machine.call_named,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _table(pairs: list[Any]) -> dict[Key, Any]:
    """Return a dictionary from keys and values in turn, without the keys that another program can make slow to hash."""
    if len(pairs) % 2:
        raise ValueError("it has a key without a value")
    return {
        key: value
        for key, value in zip(pairs[::2], pairs[1::2], strict=True)
        if isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 60)
    }
