"""Reads pickles of ``torch.save`` as data: imports no name and calls no function of the pickle.

A pickle is a program for a stack machine. This interpreter supports the opcodes that ``torch.save``
writes for numbers, strings, lists, tuples, dicts, tensors and instances of the allowed classes, and
rejects all others. Dict keys are strings and numbers only, so that hashing a key is cheap; integers
have at most 64 bits.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import shown

Callback = Callable[[tuple[Any, ...]], Any]

_MARK: Final = object()
_MAX_INTEGER: Final = 1 << 63
_PROTOCOL: Final = 2
_PLAIN: Final[Mapping[str, Callable[[Any], Any]]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "MARK": lambda _: _MARK,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
        lambda argument: argument,
    ),
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_UNREADABLE_NAMES: Final = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


class GlobalName:
    """A ``module.name`` in a pickle; it is never imported."""

    def __init__(self, name: str) -> None:
        self.name = name


def global_names(data: bytes) -> frozenset[str]:
    """Every ``module.name`` in a pickle.

    Raises ``SteerError`` for an opcode whose name cannot be read statically, and for a protocol
    that is not the default of ``torch.save``.
    """
    return frozenset(_names(data))


def _names(data: bytes) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "PROTO" and int(argument or 0) > _PROTOCOL:
            raise SteerError(
                f"its pickle has protocol {argument}; expected {_PROTOCOL}; save it "
                "again with torch.save and without pickle_protocol"
            )
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name in _UNREADABLE_NAMES:
            raise _unsupported_opcode(opcode.name)


def read_pickle(
    data: bytes,
    *,
    calls: Mapping[str, Callback],
    classes: Mapping[str, type],
    persistent: Callback,
) -> Any:
    """The value of a pickle.

    ``calls`` replace the functions that the pickle may call, by full name; it may create instances
    of ``classes``; ``persistent`` resolves persistent ids. Raises ``SteerError`` for any other name
    or opcode, and may raise any exception for a damaged pickle.
    """
    machine = _StackMachine(calls, classes, persistent)
    for opcode, argument, _ in pickletools.genops(data):
        machine.step(opcode.name, argument)
    return machine.result()


class _StackMachine:
    def __init__(
        self, calls: Mapping[str, Callback], classes: Mapping[str, type], persistent: Callback
    ) -> None:
        self._calls = calls
        self._classes = classes
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if (
            len(self._stack) != 1
            or isinstance(self._stack[0], GlobalName)
            or self._stack[0] is _MARK
        ):
            raise SteerError("its pickle does not end with one value")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PLAIN:
            if isinstance(argument, int) and not -_MAX_INTEGER <= argument < _MAX_INTEGER:
                raise SteerError(
                    f"its pickle contains {shown(argument)}; integers have at most 64 bits"
                )
            self._stack.append(_PLAIN[opcode](argument))
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._take(_TUPLES[opcode])))
        elif (method := getattr(self, f"_do_{opcode.lower()}", None)) is not None:
            method(argument)
        else:
            raise _unsupported_opcode(opcode)

    def _take(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) != count or any(item is _MARK for item in items):
            raise SteerError("its pickle pops from an empty stack; the file is damaged")
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _do_proto(self, _: int) -> None:
        """The protocol is checked by ``global_names``."""

    def _do_stop(self, _: None) -> None:
        """End of the pickle."""

    def _do_binput(self, argument: int) -> None:
        self._memo[argument] = self._take(1)[0]
        self._stack.append(self._memo[argument])

    _do_long_binput = _do_binput

    def _do_binget(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    _do_long_binget = _do_binget

    def _do_tuple(self, _: None) -> None:
        self._stack.append(tuple(self._take_marked()))

    def _do_append(self, _: None) -> None:
        self._extend(self._take(1))

    def _do_appends(self, _: None) -> None:
        self._extend(self._take_marked())

    def _do_setitem(self, _: None) -> None:
        self._set(self._take(2))

    def _do_setitems(self, _: None) -> None:
        self._set(self._take_marked())

    def _do_global(self, argument: str) -> None:
        self._stack.append(GlobalName(str(argument).replace(" ", ".", 1)))

    def _do_reduce(self, _: None) -> None:
        called, arguments = self._take(2)
        if not isinstance(called, GlobalName) or called.name not in self._calls:
            raise SteerError(
                f"its pickle calls {_name(called)}, which is not allowed; no code was executed"
            )
        self._stack.append(self._calls[called.name](_arguments(arguments)))

    def _do_newobj(self, _: None) -> None:
        cls, arguments = self._take(2)
        if not isinstance(cls, GlobalName) or cls.name not in self._classes or arguments != ():
            raise SteerError(
                f"its pickle creates {_name(cls)}, which is not allowed; no code was executed"
            )
        self._stack.append(object.__new__(self._classes[cls.name]))

    def _do_build(self, _: None) -> None:
        target, state = self._take(2)
        if isinstance(target, dict):
            return self._stack.append(target)  # attributes of an OrderedDict are ignored
        if type(target) not in self._classes.values() or not _is_state(state):
            raise SteerError(f"its pickle sets the state of {_name(target)}")
        if vars(target):
            raise SteerError(f"its pickle sets the state of {_name(target)} twice")
        vars(target).update(state)
        self._stack.append(target)

    def _do_binpersid(self, _: None) -> None:
        self._stack.append(self._persistent(_arguments(self._take(1)[0])))

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise SteerError(f"its pickle appends to {_name(target)}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise SteerError(f"its pickle sets items of {_name(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise SteerError(f"a dict has the key {_name(key)}; expected strings and numbers")
            if key in target:
                raise SteerError(f"a dict has the duplicate key {_name(key)}")
            target[key] = value


def _arguments(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise SteerError(f"its pickle passes {_name(value)} as arguments; expected a tuple")
    return value


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(key, str) for key in state)


def _name(value: Any) -> str:
    return value.name if isinstance(value, GlobalName) else shown(value)


def _unsupported_opcode(opcode: str) -> SteerError:
    return SteerError(
        f"its pickle uses {opcode}, which torch.save does not write; no code was executed"
    )
