"""Text from files, configs and requests, made safe to print.

What comes from outside can be endless (a tuple that holds itself twice, sixty deep), can be meant
for the terminal (escape sequences, right-to-left marks) and can have a ``__repr__`` of its own.
Every message, table and log line takes such values from here: bounded, on one line, printable.
``SteerError`` sends its message through ``printable`` as well.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final

LONGEST: Final = 100
"""Characters of one value in a message."""
LONGEST_LIST: Final = 200
LONGEST_MESSAGE: Final = 1000
_CUT: Final = "..."
_MOST_ITEMS: Final = 6
_DEEPEST: Final = 2
_PLAIN_DIGITS: Final = 20
_MOST_DIGITS: Final = 4000
_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Printable for Unicode and seen by nobody: fillers, and selectors of a letter's variant."""
_TENSORS: Final = ("Tensor", "ndarray")
_NUMBER: Final = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def shown(value: Any, longest: int = LONGEST) -> str:
    """A value as Python writes it, in at most ``longest`` characters and in bounded time.

    A text is quoted, a long whole number is described, a container shows its first items, and
    what is no plain value is named by its type.
    """
    return cut(_shown(value, longest, depth=0), longest)


def printable(text: str, longest: int | None = None, *, lines: bool = False) -> str:
    """A text without quotes: what is not printable is escaped as in Python's literals.

    That takes control characters, line breaks (kept with ``lines``), text direction marks,
    invisible characters and lone surrogates; letters of every script stay.
    """
    text = text if longest is None else cut(text, longest)
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    escaped = "".join(c if _is_seen(c) or (lines and c == "\n") else _escape(c) for c in text)
    return escaped if longest is None else cut(escaped, longest)


def _is_seen(letter: str) -> bool:
    return letter.isprintable() and not _INVISIBLE.match(letter)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def name(value: Any, longest: int = LONGEST) -> str:
    """A name, or a key that should be one: a text as it is, anything else as it is shown."""
    return printable(value, longest) if isinstance(value, str) else shown(value, longest)


def listed(values: Iterable[Any], longest: int = LONGEST_LIST, *, none: str = "none") -> str:
    """Names in a row, as many as fit, and how many there are beside them."""
    names: list[str] = []
    length = num_omitted = 0
    for value in values:
        if num_omitted or (names and length > longest):
            num_omitted += 1
            continue
        names.append(name(value))
        length += len(names[-1]) + 2
    if not names:
        return none
    return ", ".join(names) + (f" and {num_omitted} more" if num_omitted else "")


def is_number(text: str) -> bool:
    """Whether a text is a decimal number in ASCII: Python would take '1_0' and others' digits."""
    return _NUMBER.fullmatch(text.strip(" ")) is not None


def message(text: str) -> str:
    """A message in one printable line of at most ``LONGEST_MESSAGE`` characters.

    Of a longer one the beginning and the end are kept: the end says what to do.
    """
    return _shortened(printable(_shortened(text)))


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_MESSAGE:
        return text
    tail = LONGEST_MESSAGE // 3
    return cut(text, LONGEST_MESSAGE - tail) + text[-tail:]


def cut(text: str, longest: int) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= longest else text[: max(0, longest - len(_CUT))] + _CUT


def _shown(value: Any, longest: int, depth: int) -> str:
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return _whole_number(value)
    if isinstance(value, str | bytes | bytearray):
        text = repr(value[:longest]) + (_CUT if len(value) > longest else "")
        return printable(text) if isinstance(value, str) else text
    if isinstance(value, PurePath):
        return _shown(str(value), longest, depth)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _container(value, longest, depth)
    if _is_tensor(value):
        return f"a tensor {list(value.shape)[:_MOST_ITEMS]} in {value.dtype}"
    kind = printable(type(value).__name__, LONGEST)
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _is_tensor(value: Any) -> bool:
    """By its class: an object out of a file may have any attributes."""
    return any(
        cls.__module__.partition(".")[0] in ("torch", "numpy") and cls.__name__ in _TENSORS
        for cls in type(value).__mro__
    )


def _whole_number(value: int) -> str:
    if abs(value) < 10**_PLAIN_DIGITS:
        return repr(int(value))
    digits = int(value.bit_length() * math.log10(2)) + 1
    if digits < _MOST_DIGITS:  # Python writes no longer ones
        return f"a whole number of {len(str(abs(value)))} digits"
    return f"a whole number of about {digits} digits"


def _container(value: Any, longest: int, depth: int) -> str:
    opening, closing = (
        "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    )
    if depth == _DEEPEST:
        return opening + _CUT + closing if len(value) else opening + closing
    parts = []
    for count, item in enumerate(value):
        if count == _MOST_ITEMS:
            parts.append(_CUT)
            break
        part = _shown(item, longest, depth + 1)
        if isinstance(value, Mapping):
            part += f": {_shown(value[item], longest, depth + 1)}"
        parts.append(part)
    return opening + ", ".join(parts) + closing
