"""Pickles as data: a stack machine that knows a closed set of opcodes and names, and runs nothing else.

A pickle is a program for a stack machine, and an unpickler lets it import and call whatever it names. The machine
here knows only the opcodes that containers of arrays are written with, and refuses a name that is not in the table
it was given. What it builds is inert: dicts, lists, tuples, numbers, text, and what the functions of that table
return; these describe arrays and allocate none. Whoever uses the machine makes the arrays afterwards.

An opcode takes constant time apart from the bytes and stack items it consumes, so what a pickle can cost is bounded
by its length, and that by the caller. One byte can make an object of a hundred, though, or an entry of the memo, so the
number of opcodes has a bound of its own: about forty describe a tensor.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_OPCODE_LIMIT = 1 << 20
_KEY_LIMIT = 4096  # comparing two long equal keys costs their length, for an opcode of two bytes


class PickleError(ValueError):
    """A pickle that is damaged, or that is more than a description of arrays."""


@dataclass(frozen=True, eq=False)
class _Function:
    call: Callable[..., Any]
    arguments: range  # how many it may take


def function(call: Callable[..., Any], fewest: int, most: int | None = None) -> _Function:
    """An entry of a table of names: something that a pickle may call, with `fewest` to `most` arguments."""
    return _Function(call, range(fewest, (fewest if most is None else most) + 1))


def dict_key(key: object) -> Any:
    """Returns a dict key, if hashing and comparing it is cheap: nested tuples and huge integers are not."""
    if isinstance(key, str) and len(key) <= _KEY_LIMIT:
        return key
    if isinstance(key, float) or (isinstance(key, int) and abs(key) < 1 << 63):
        return key
    raise PickleError(f"a dict key that is too long or too large, or of type {type(key).__name__}")


# An opcode that is in none of these tables is refused.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_VALUES |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADD = {"SETITEM": dict, "SETITEMS": dict, "APPEND": list, "APPENDS": list, "ADDITEMS": list}
_OTHER = {"PROTO", "FRAME", "MARK", "TUPLE", "FROZENSET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET"}
_OTHER |= {"LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "STOP"}
_KNOWN = {*_VALUES, *_CONSTANTS, *_EMPTY, *_TUPLES, *_ADD, *_OTHER}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class Machine:
    """Runs one pickle. Sets become lists: nothing needs them, and a list asks no hash of its items."""

    def __init__(
        self,
        file: io.BytesIO,
        *,
        names: Mapping[tuple[str, str], Any],
        build: Callable[[Any, Any], bool],
        persistent: Callable[[Any], Any] | None = None,
        what: str,
        at_end: str = "is cut off before its end",
    ):
        """Prepares to run the pickle at the file's position.

        Args:
            file: the pickle, in memory; it is left behind the pickle's end.
            names: what the pickle may name, by module and attribute.
            build: `build(target, state)` takes the state that the pickle gives to an object, or returns False.
            persistent: makes an object from a persistent id; without it such ids are refused.
            what: what the pickle should describe, for messages.
            at_end: what it means that the file ends before the pickle does; a caller that cuts long ones says so.

        `build`, `persistent` and the functions in `names` raise PickleError for what they do not accept.
        """
        self.file = file
        self.names = names
        self.build = build
        self.persistent = persistent
        self.what = what
        self.at_end = at_end
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes. Raises PickleError with the opcode and its place."""
        for _ in range(_OPCODE_LIMIT):
            position = self.file.tell()
            code = self.file.read(1)
            if not code:
                raise PickleError(f"the pickle {self.at_end}")
            opcode = _OPCODES.get(code)
            name = repr(code) if opcode is None else opcode.name
            try:
                if opcode is None or name not in _KNOWN:
                    raise PickleError(f"refused, no part of {self.what}")
                if name == "GLOBAL":  # pickletools would interpret escapes and join the two names
                    argument = [self.file.readline().rstrip(b"\n").decode() for _ in range(2)]
                else:
                    argument = None if opcode.arg is None else opcode.arg.reader(self.file)
                if name == "STOP":
                    return self.stack.pop()
                self._step(name, argument)
            except PickleError as error:
                raise PickleError(f"opcode {name} at byte {position} of the pickle: {error}") from None
            except IndexError:
                raise PickleError(f"opcode {name} at byte {position} finds its stack empty") from None
            except ValueError:
                raise PickleError(f"opcode {name} at byte {position} is cut off or malformed") from None
        raise PickleError(f"the pickle has more than {_OPCODE_LIMIT} opcodes, too many for {self.what}")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise PickleError(f"nothing is remembered under {argument}")
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in ("TUPLE", "FROZENSET"):
            items = self._items()
            self.stack.append(tuple(items))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[i] for i in range(-_TUPLES[name], 0))]
        elif name in _ADD:
            self._add(name)
        elif name == "GLOBAL":
            stack.append(self._global(*argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(module, attribute))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, _Function) or not isinstance(arguments, tuple):
                raise PickleError("a call of something that is not one of the known functions")
            if len(arguments) not in called.arguments:
                raise PickleError(f"a known function is called with {len(arguments)} arguments")
            stack.append(called.call(*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if not self.build(target, state):
                raise PickleError(f"state is given to an object of type {type(target).__name__}")
        elif name == "BINPERSID":
            if self.persistent is None:
                raise PickleError(f"refused, no part of {self.what}")
            stack.append(self.persistent(stack.pop()))
        elif name == "PROTO" and argument > 5:
            raise PickleError(f"pickle protocol {argument}")

    def _global(self, module: object, name: object) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a global is named by something that is not text")
        if (module, name) not in self.names:
            shown = f"{module[:200]}.{name[:200]}"
            raise PickleError(f"the global {shown!r} is not part of {self.what} and is refused")
        return self.names[module, name]

    def _items(self) -> list[Any]:
        """The items above the last MARK, which is taken away."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _add(self, name: str) -> None:
        if name in ("SETITEM", "APPEND"):
            count = 2 if name == "SETITEM" else 1
            items = [self.stack.pop() for _ in range(count)][::-1]
        else:
            items = self._items()
        target = self.stack[-1]
        if not isinstance(target, _ADD[name]):
            raise PickleError(f"items are added to an object of type {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)
        elif len(items) % 2:
            raise PickleError("a dict is given a key without a value")
        else:
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[dict_key(key)] = value
