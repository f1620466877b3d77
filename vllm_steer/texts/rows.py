"""Rows of a text file, one at a time: JSONL, JSON, CSV, TSV or plain text."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from vllm_steer.errors import SteerError
from vllm_steer.files.json_text import unique_keys
from vllm_steer.untrusted_text import shown

T = TypeVar("T")
_CHUNK: Final = 1 << 16
_SHOWN: Final = 10
_LONGEST: Final = 1 << 24
_BROKEN: Final = "it has bytes that are not UTF-8"


@dataclass(frozen=True)
class Row:
    """One row: its values by name and its place, such as ``reviews.jsonl:12``.

    A row that cannot be read has a ``problem`` and no values.
    """

    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file in their order, read as they are asked for; blank lines are none.

    By the file's ending: ``.jsonl`` an object a line, ``.json`` a list of objects, ``.csv`` and
    ``.tsv`` with a line of names, ``.txt`` a text a line, under the name ``text``. UTF-8.

    Raises ``SteerError`` for another ending, a file that cannot be read and a JSON file that is no
    list. A bad row does not raise: it has a ``problem``, see ``take``.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SteerError(
            f"{path}: the ending is {path.suffix or 'missing'}; texts are read from "
            f"{', '.join(SUFFIXES)}"
        )
    if not os.path.isfile(path):
        found = "is no plain file" if os.path.lexists(path) else "no such file"
        raise SteerError(f"{path}: {found}; give a file of texts")
    try:
        # A byte that is no UTF-8 becomes a lone surrogate, so that its row can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, values in reader(file):
                yield _row(f"{path.name}:{line}", values)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
    except _Malformed as error:
        raise SteerError(f"{path}:{error}") from None


def take(rows: Iterable[Row], read: Callable[[Row], T]) -> Iterator[T]:
    """``read`` of every row; one ``SteerError`` at the end names each row that it refused.

    ``read`` is only given rows without a problem of their own.
    """
    problems: list[str] = []
    more = 0
    for row in rows:
        try:
            if row.problem:
                raise SteerError(f"{row.place}: {row.problem}")
            yield read(row)
        except SteerError as error:
            if len(problems) < _SHOWN:
                problems.append(str(error))
            else:
                more += 1
    if problems:
        raise SteerError("; ".join(problems) + (f"; and {more} more bad rows" if more else ""))


def text_of(row: Row, name: str) -> str:
    """A row's non-empty text under a name; ``SteerError`` says what the row has instead."""
    if name not in row.values:
        raise SteerError(
            f"{row.place}: there is no {name!r}; the row has "
            f"{', '.join(map(shown, row.values)) or 'nothing'}"
        )
    value = row.values[name]
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        value = value["text"]  # the prompts of the LM-Steer authors: {"prompt": {"text": ...}}
        if _broken(value):
            raise SteerError(f"{row.place}: {_BROKEN}")
    if not isinstance(value, str) or not value.strip():
        raise SteerError(f"{row.place}: {name} is {shown(value)}; expected a text")
    return value


def _row(place: str, values: Any) -> Row:
    if isinstance(values, _Bad):
        return Row(place, problem=values.reason)
    if not isinstance(values, Mapping):
        return Row(place, problem=f"the row is {shown(values)}; expected an object")
    if any(_broken(value) for value in values.values()):
        return Row(place, problem=_BROKEN)
    return Row(place, values)


def _broken(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


class _Malformed(Exception):
    """The file as a whole cannot be read on; begins with the line."""


@dataclass(frozen=True)
class _Bad:
    reason: str


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; none is longer than a row may be."""
    line = 1
    while text := file.readline(_LONGEST + 1):
        if len(text) > _LONGEST:
            raise _Malformed(f"{line}: a line of more than {_LONGEST} letters")
        yield line, text
        line += 1


def _jsonl(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(file):
        if text.strip():
            yield line, _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except SteerError as error:
        return _Bad(str(error))
    except (ValueError, RecursionError) as error:
        return _Bad(f"no JSON ({_cause(error)})")


def _cause(error: ValueError | RecursionError) -> str:
    """Why there is no JSON, without a line number: that is one of the piece that was parsed."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """The items of one JSON list, without holding more of the file than an item and a chunk."""
    text = _Ahead(file)
    if text.next_letter() != "[":
        raise _Malformed(f"{text.line}: a JSON file holds one list of objects")
    text.step()
    if text.next_letter() == "]":
        text.step()
    else:
        last = False
        while not last:
            text.next_letter()
            yield text.line, text.item()
            mark = text.next_letter()
            if mark not in (",", "]"):
                said = (
                    f"{mark!r} where a comma or ] is expected" if mark else "the list does not end"
                )
                raise _Malformed(f"{text.line}: no JSON ({said})")
            last = mark == "]"
            text.step()
    if text.next_letter():
        raise _Malformed(f"{text.line}: something follows the end of the list")


class _Ahead:
    """A file read in chunks: what is ahead of a place in it, and the place's line."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at = file, "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        self.line = 1

    def next_letter(self) -> str:
        """The next letter that is no space, without stepping over it; empty at the file's end."""
        while True:
            while self._at < len(self._text):
                letter = self._text[self._at]
                if letter not in " \t\r\n":
                    return letter
                self.step()
            if not self._more():
                return ""

    def step(self) -> None:
        """Go on by one letter."""
        self.line += self._text[self._at] == "\n"
        self._at += 1

    def item(self) -> Any:
        """The JSON value that begins here; ``_Malformed`` if there is none."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                problem = "the list does not end"
            except SteerError as error:
                raise _Malformed(f"{self.line}: {error}") from None
            except (ValueError, RecursionError) as error:
                end, problem = len(self._text), _cause(error)
            # At the end of what was read, a number may go on in the next chunk.
            if end < len(self._text):
                self.line += self._text.count("\n", self._at, end)
                self._at = end
                return value
            if len(self._text) - self._at > _LONGEST:
                raise _Malformed(f"{self.line}: no JSON in {_LONGEST} letters ({problem})")
            if not self._more():
                raise _Malformed(f"{self.line}: no JSON ({problem})")

    def _more(self) -> bool:
        """Read on, as much as is unread: a long item is parsed a few times only."""
        unread = self._text[self._at :]
        more = self._file.read(max(_CHUNK, len(unread)))
        self._text, self._at = unread + more, 0
        return bool(more)


def _csv(file: IO[str]) -> Iterator[tuple[int, Any]]:
    return _table(file, ",")


def _tsv(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, values in _table(file, "\t"):
        if isinstance(values, dict) and any(set("\t\r\n") & set(v) for v in values.values()):
            values = _Bad(
                "a quoted value with a tab or a line break; write \\t or \\n, or give a .csv"
            )
        yield line, values


def _table(file: IO[str], delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST)
    line, names = 1, None
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for values in reader:
            if values and names is None:
                names = _names(line, values)
            elif names is not None and len(values) == len(names):
                yield line, dict(zip(names, values, strict=True))
            elif values and names is not None:
                yield line, _Bad(f"{len(values)} values; the first line names {len(names)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise _Malformed(f"{line}: no CSV ({error})") from None


def _names(line: int, names: list[str]) -> list[str]:
    if any(map(_broken, names)):
        raise _Malformed(f"{line}: {_BROKEN}")
    if len(set(names)) < len(names) or not all(names):
        raise _Malformed(
            f"{line}: the first line must name each column once; it is {shown(names, 200)}"
        )
    return names


def _txt(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(file):
        if text.strip():
            yield line, {"text": text.rstrip("\r\n")}


_READERS: Final[Mapping[str, Callable[[IO[str]], Iterator[tuple[int, Any]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
}
SUFFIXES: Final = tuple(_READERS)
