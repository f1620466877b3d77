"""What ``torch.save`` pickles, read as data: no name is looked up, nothing is called.

A pickle is a program for a small stack machine. This one knows the instructions that ``torch.save``
writes for numbers, texts, lists, tuples, dicts, tensors and the plain classes that it is given, and
refuses every other. Dict keys are texts and numbers only, so that no key has to be hashed or
compared at length, and whole numbers have at most 64 bits.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.foreign import shown

Call = Callable[[tuple[Any, ...]], Any]

_MARK: Final = object()
_LARGEST: Final = 1 << 63
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
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), lambda given: given
    ),
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_UNREADABLE_NAMES: Final = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


class Name:
    """A ``module.name`` of the pickle, which is never imported."""

    def __init__(self, name: str) -> None:
        self.name = name


def names_in(data: bytes) -> frozenset[str]:
    """Every ``module.name`` in a pickle. Raises ``SteerError`` where one cannot be told, and for a
    protocol that ``torch.save`` writes only when asked to.
    """
    return frozenset(_names(data))


def _names(data: bytes) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "PROTO" and int(argument or 0) > _PROTOCOL:
            raise SteerError(
                f"its pickle has protocol {argument}; save it anew with torch.save's own, "
                f"{_PROTOCOL} (without pickle_protocol)"
            )
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name in _UNREADABLE_NAMES:
            raise _unknown(opcode.name)


def read_pickle(
    data: bytes,
    *,
    calls: Mapping[str, Call],
    classes: Mapping[str, type],
    persistent: Call,
) -> Any:
    """What a pickle describes.

    ``calls`` are what it may call, by the full names, ``classes`` those whose plain instances it
    may make, ``persistent`` makes something of a persistent id. Raises ``SteerError`` for any other
    name or instruction, and anything at all for a damaged pickle.
    """
    machine = _Machine(calls, classes, persistent)
    for opcode, argument, _ in pickletools.genops(data):
        machine.step(opcode.name, argument)
    return machine.result()


class _Machine:
    def __init__(
        self, calls: Mapping[str, Call], classes: Mapping[str, type], persistent: Call
    ) -> None:
        self._calls = calls
        self._classes = classes
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1 or isinstance(self._stack[0], Name) or self._stack[0] is _MARK:
            raise SteerError("its pickle does not end with one value")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PLAIN:
            if isinstance(argument, int) and not -_LARGEST <= argument < _LARGEST:
                raise SteerError(f"its pickle holds {shown(argument)}; at most 64 bits are read")
            self._stack.append(_PLAIN[opcode](argument))
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._take(_TUPLES[opcode])))
        elif (method := getattr(self, f"_do_{opcode.lower()}", None)) is not None:
            method(argument)
        else:
            raise _unknown(opcode)

    def _take(self, count: int) -> list[Any]:
        taken = self._stack[-count:]
        if len(taken) != count or any(item is _MARK for item in taken):
            raise SteerError("its pickle takes values that are not there")
        del self._stack[-count:]
        return taken

    def _take_marked(self) -> list[Any]:
        taken: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            taken.append(item)
        return taken[::-1]

    def _do_proto(self, _: int) -> None:
        """Checked where the names are read."""

    def _do_stop(self, _: None) -> None:
        """Nothing is left to do."""

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
        self._stack.append(Name(str(argument).replace(" ", ".", 1)))

    def _do_reduce(self, _: None) -> None:
        called, arguments = self._take(2)
        if not isinstance(called, Name) or called.name not in self._calls:
            raise SteerError(f"its pickle calls {_name(called)}; nothing of it was called")
        self._stack.append(self._calls[called.name](_arguments(arguments)))

    def _do_newobj(self, _: None) -> None:
        made, arguments = self._take(2)
        if not isinstance(made, Name) or made.name not in self._classes or arguments != ():
            raise SteerError(f"its pickle makes {_name(made)}; nothing of it was called")
        self._stack.append(object.__new__(self._classes[made.name]))

    def _do_build(self, _: None) -> None:
        target, state = self._take(2)
        if isinstance(target, dict):
            return self._stack.append(target)  # attributes of an OrderedDict mean nothing here
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
                raise SteerError(f"a dict has the key {_name(key)}; texts and numbers are read")
            if key in target:
                raise SteerError(f"a dict has the key {_name(key)} twice")
            target[key] = value


def _arguments(given: Any) -> tuple[Any, ...]:
    if not isinstance(given, tuple):
        raise SteerError(f"its pickle calls with {_name(given)}; expected a tuple")
    return given


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(key, str) for key in state)


def _name(value: Any) -> str:
    return value.name if isinstance(value, Name) else shown(value)


def _unknown(opcode: str) -> SteerError:
    return SteerError(
        f"its pickle uses {opcode}, which torch.save does not write; nothing of it was loaded"
    )
