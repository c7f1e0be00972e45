"""A pickle read without executing anything of it: its opcodes are carried out here, its names looked up in a table.

What a name stands for is not called with whatever the pickle has for it: each is a function of ours that looks at its
arguments (`safe_names`, `safe_arrays`), builds what is meant with a public constructor, and allocates no more than the
pickle and its storages have bytes. Nobody's `__setstate__` is called. There is no state outside of the reader, so any
number of threads may read.

Of the pickle protocol the opcodes that `torch.save` writes are known (protocol 2).
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.torch_private import STATE_DICT_VERSIONS

NESTING_MAX = 500
"""Of tuples within a key: Python hashes them recursively."""
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_MARK = object()


class Refused(Exception):
    """What the pickle asks for is not done; `str` names it."""


class UnknownName(Refused):
    """It names something that is not in the table."""


class Malformed(Exception):
    """No pickle of a value."""


@dataclass(frozen=True)
class Function:
    """What stands for something that can be called, but is no value itself."""

    name: str


class Stranger:
    """What another loader would make of something that is not known here; it takes whatever it is given."""


@dataclass
class Pending:
    """An object that the pickle has created, and whose state it is about to give.

    `build` makes it of that state.
    """

    build: Callable[[Any], Any]
    memo: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """What a pickle may ask for.

    `find`: what a name stands for, or raises UnknownName. `makers`: what is done for a call of that, with the tuple of
    arguments; `creators`: for `object.__new__` of it. `load`: the storage with that persistent id.
    They raise Refused for arguments that nothing honest has, and whatever Python raises for bad ones.
    """

    find: Callable[[str, str], Any]
    makers: Mapping[Any, Callable[..., Any]]
    creators: Mapping[Any, Callable[..., Pending]]
    load: Callable[[Any], Any]


def read(data: bytes, names: Names) -> Any:
    """The value that the pickle stands for.

    Raises:
        Refused, UnknownName: it asks for something that is not allowed.
        Malformed: it makes no sense.
    """
    try:
        return _Reader(data, names).run()
    except (Refused, Malformed):
        raise
    except Exception as error:  # noqa: BLE001 - it may be anything, and raise anything
        raise Malformed(f"{type(error).__name__}: {error}") from None


class _Reader:
    def __init__(self, data: bytes, names: Names) -> None:
        self._data = data
        self._at = 0
        self._names = names
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # what is there once may be named again and again, in two bytes: so work is counted, of keys and of calls
        self._hashing_left = 10 * len(data) + 1000
        self._calling_left = 8 * len(data) + 4096

    def run(self) -> Any:
        data, stack, push = self._data, self._stack, self._stack.append
        while True:
            code = data[self._at]
            self._at += 1
            if code in _CONSTANTS:
                push(_CONSTANTS[code])
            elif code in _EMPTY:
                push(_EMPTY[code]())
            elif code in _PACKED:
                size, unpack = _PACKED[code]
                push(unpack(data, self._at)[0])
                self._at += size
            elif code == _STOP:
                (value,) = stack
                if value is _MARK or isinstance(value, (Function, Pending)):
                    raise Malformed("it ends with no value")
                return value
            else:
                action = _ACTIONS.get(code)
                if action is None and chr(code) not in _ALL:
                    raise Malformed(f"no pickle opcode {code}")
                if action is None:
                    raise Refused(f"pickle opcode {bytes([code])!r}, which torch.save does not write")
                action(self)

    def _take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise Malformed("it ends in the middle")
        self._at += size
        return found

    def _number(self, kind: struct.Struct) -> int:
        return int(kind.unpack(self._take(kind.size))[0])

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Malformed("no mark")
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def _check_key(self, key: Any) -> None:
        """That it can be hashed in bounded time and depth."""
        level, depth = [key], 0
        while level:
            depth += 1
            self._hashing_left -= sum(1 + part.bit_length() // 32 if type(part) is int else 1 for part in level)
            if depth > NESTING_MAX or self._hashing_left < 0:
                raise Refused("a key of too many parts")
            level = [part for parts in level if isinstance(parts, (tuple, frozenset)) for part in parts]

    def _charge(self, args: tuple[Any, ...]) -> None:
        """That what a call may copy is bounded."""
        self._calling_left -= sum(len(arg) for arg in args if isinstance(arg, (str, bytes, list, dict, tuple)))
        if self._calling_left < 0:
            raise Refused("the same content again and again")

    # opcodes ----------------------------------------------------------------------------------------------------

    def proto(self) -> None:
        if (protocol := self._take(1)[0]) != 2:
            raise Refused(f"pickle protocol {protocol}, where torch.save has 2")

    def mark(self) -> None:
        self._stack.append(_MARK)

    def unicode(self) -> None:
        self._stack.append(self._take(self._number(_U32)).decode("utf-8", "surrogatepass"))

    def long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def long4(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(_U32)), "little", signed=True))

    def tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def tuple1(self) -> None:
        self._tuple_of(1)

    def tuple2(self) -> None:
        self._tuple_of(2)

    def tuple3(self) -> None:
        self._tuple_of(3)

    def _tuple_of(self, num: int) -> None:
        self._stack[-num:] = [tuple(self._stack[-num:])]

    def append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Stranger:
            return
        if type(target) is not list and type(target) is not deque:
            raise Refused(f"elements for a {type(target).__name__}")
        target.extend(values)

    def setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def setitems(self) -> None:
        self._update(self._since_mark())

    def _update(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in _MAPPINGS and type(target) is not Stranger:
            raise Refused(f"items for a {type(target).__name__}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            self._check_key(key)
            if not isinstance(target, Stranger):
                target[key] = value

    def put1(self) -> None:
        self._put(self._take(1)[0])

    def put4(self) -> None:
        self._put(self._number(_U32))

    def _put(self, slot: int) -> None:
        value = self._stack[-1]
        if isinstance(value, Pending):
            value.memo.append(slot)
        self._memo[slot] = value

    def get1(self) -> None:
        self._stack.append(self._memo[self._take(1)[0]])

    def get4(self) -> None:
        self._stack.append(self._memo[self._number(_U32)])

    def find(self) -> None:
        ends = [self._data.index(b"\n", self._at)]
        ends.append(self._data.index(b"\n", ends[0] + 1))
        module, name = self._data[self._at : ends[0]], self._data[ends[0] + 1 : ends[1]]
        self._at = ends[1] + 1
        self._stack.append(self._names.find(module.decode(), name.decode()))

    def reduce(self) -> None:
        args = self._stack.pop()
        maker = self._maker(self._names.makers)
        if type(args) is not tuple:
            raise Malformed("a call without arguments")
        self._charge(args)
        if self._stack[-1] is set or self._stack[-1] is frozenset:
            for element in args[0] if args else ():
                self._check_key(element)
        self._stack[-1] = maker(*args)

    def new(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = self._maker(self._names.creators)(*args)

    def _maker(self, among: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
        wanted = self._stack[-1]
        maker = among.get(wanted) if isinstance(wanted, (type, Function)) else None
        if maker is None:
            name = wanted.__qualname__ if isinstance(wanted, type) else getattr(wanted, "name", type(wanted).__name__)
            raise Refused(f"a call of {name}")
        return maker

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is OrderedDict:
            if type(state) is not dict or state.keys() - {STATE_DICT_VERSIONS}:
                raise Refused("an OrderedDict with attributes")
            target.__dict__.update(state)
        elif isinstance(target, Pending):
            self._charge(state if type(state) is tuple else (state,))
            self._stack[-1] = value = target.build(state)
            for slot in target.memo:
                self._memo[slot] = value
        elif not isinstance(target, Stranger):
            raise Refused(f"a state for a {type(target).__name__}")

    def persistent(self) -> None:
        self._stack[-1] = self._names.load(self._stack[-1])


_U32 = struct.Struct("<I")
_ALL = frozenset(opcode.code for opcode in pickletools.opcodes)
_STOP = pickle.STOP[0]
_CONSTANTS = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False, pickle.EMPTY_TUPLE[0]: ()}
_EMPTY: dict[int, Callable[[], Any]] = {
    pickle.EMPTY_LIST[0]: list,
    pickle.EMPTY_DICT[0]: dict,
    pickle.EMPTY_SET[0]: set,
}
_PACKED = {
    code[0]: (kind.size, kind.unpack_from)
    for code, kind in (
        (pickle.BININT, struct.Struct("<i")),
        (pickle.BININT1, struct.Struct("<B")),
        (pickle.BININT2, struct.Struct("<H")),
        (pickle.BINFLOAT, struct.Struct(">d")),
    )
}
_ACTIONS: dict[int, Callable[[_Reader], None]] = {
    pickle.PROTO[0]: _Reader.proto,
    pickle.MARK[0]: _Reader.mark,
    pickle.BINUNICODE[0]: _Reader.unicode,
    pickle.LONG1[0]: _Reader.long1,
    pickle.LONG4[0]: _Reader.long4,
    pickle.TUPLE[0]: _Reader.tuple,
    pickle.TUPLE1[0]: _Reader.tuple1,
    pickle.TUPLE2[0]: _Reader.tuple2,
    pickle.TUPLE3[0]: _Reader.tuple3,
    pickle.APPEND[0]: _Reader.append,
    pickle.APPENDS[0]: _Reader.appends,
    pickle.SETITEM[0]: _Reader.setitem,
    pickle.SETITEMS[0]: _Reader.setitems,
    pickle.BINPUT[0]: _Reader.put1,
    pickle.LONG_BINPUT[0]: _Reader.put4,
    pickle.BINGET[0]: _Reader.get1,
    pickle.LONG_BINGET[0]: _Reader.get4,
    pickle.GLOBAL[0]: _Reader.find,
    pickle.REDUCE[0]: _Reader.reduce,
    pickle.NEWOBJ[0]: _Reader.new,
    pickle.BUILD[0]: _Reader.build,
    pickle.BINPERSID[0]: _Reader.persistent,
}
