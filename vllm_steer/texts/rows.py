"""Rows of a text file, read lazily: JSONL, JSON, CSV, TSV, or plain or fastText text."""

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
_FASTTEXT: Final = "__label__"
_BROKEN: Final = "it has bytes that are not UTF-8"


@dataclass(frozen=True)
class Row:
    """One row: its values by name and its location, such as ``reviews.jsonl:12``.

    An invalid row has a ``problem`` and no values.
    """

    location: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the rows of a file lazily and in order; blank lines are skipped.

    The format depends on the extension: ``.jsonl`` one object per line, ``.json`` a list of
    objects, ``.csv`` and ``.tsv`` with a header line, ``.txt`` one text per line, under the name
    ``text``; all in UTF-8. A line of ``.txt`` that begins with ``__label__NAME`` and white space,
    as fastText writes it, has the rest as its ``text`` and ``NAME`` as its ``label``.

    Raises ``SteerError`` for another extension, for a file that cannot be read and for a JSON file
    that is not a list. An invalid row raises nothing: it has a ``problem``, see ``take``.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SteerError(
            f"{path}: the file name extension is {path.suffix or 'missing'}; supported: "
            f"{', '.join(SUFFIXES)}"
        )
    if not os.path.isfile(path):
        problem = "is not a regular file" if os.path.lexists(path) else "no such file"
        raise SteerError(f"{path}: {problem}; give a file of texts")
    try:
        # An invalid UTF-8 byte becomes a lone surrogate, so that the error can name its row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, values in reader(file):
                yield _row(f"{path.name}:{line}", values)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
    except _MalformedFileError as error:
        raise SteerError(f"{path}:{error}") from None


def take(rows: Iterable[Row], read: Callable[[Row], T]) -> Iterator[T]:
    """Apply ``read`` to every valid row; raise one ``SteerError`` at the end with all invalid rows.

    A row is invalid if it has a ``problem`` or if ``read`` raises a ``SteerError``.
    """
    problems: list[str] = []
    omitted = 0
    for row in rows:
        try:
            if row.problem:
                raise SteerError(f"{row.location}: {row.problem}")
            yield read(row)
        except SteerError as error:
            if len(problems) < _SHOWN:
                problems.append(str(error))
            else:
                omitted += 1
    if problems:
        raise SteerError(
            "; ".join(problems) + (f"; and {omitted} more bad rows" if omitted else "")
        )


def text_of(row: Row, name: str) -> str:
    """A row's non-empty text under a name. Raises ``SteerError`` with what the row has instead."""
    if name not in row.values:
        raise SteerError(
            f"{row.location}: the field {name!r} is missing; the row has "
            f"{', '.join(map(shown, row.values)) or 'nothing'}"
        )
    value = row.values[name]
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        value = value["text"]  # the prompts of the LM-Steer authors: {"prompt": {"text": ...}}
        if _broken(value):
            raise SteerError(f"{row.location}: {_BROKEN}")
    if not isinstance(value, str) or not value.strip():
        raise SteerError(f"{row.location}: {name} is {shown(value)}; expected a text")
    return value


def _row(location: str, values: Any) -> Row:
    if isinstance(values, _BadRow):
        return Row(location, problem=values.reason)
    if not isinstance(values, Mapping):
        return Row(location, problem=f"the row is {shown(values)}; expected an object")
    if any(_broken(value) for value in values.values()):
        return Row(location, problem=_BROKEN)
    return Row(location, values)


def _broken(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


class _MalformedFileError(Exception):
    """The rest of the file cannot be read; the message begins with the line."""


@dataclass(frozen=True)
class _BadRow:
    reason: str


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, with a limit on their length."""
    line = 1
    while text := file.readline(_LONGEST + 1):
        if len(text) > _LONGEST:
            raise _MalformedFileError(f"{line}: a line of more than {_LONGEST} characters")
        yield line, text
        line += 1


def _jsonl(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(file):
        if text.strip():
            yield line, _parse(text)


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except SteerError as error:
        return _BadRow(str(error))
    except (ValueError, RecursionError) as error:
        return _BadRow(f"invalid JSON ({_cause(error)})")


def _cause(error: ValueError | RecursionError) -> str:
    """The reason of a JSON error, without its line number, which is relative to the parsed part."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list, with at most one item and one chunk of the file in memory."""
    text = _JsonReader(file)
    if text.next_letter() != "[":
        raise _MalformedFileError(f"{text.line}: a JSON file holds one list of objects")
    text.step()
    if text.next_letter() == "]":
        text.step()
    else:
        last = False
        while not last:
            text.next_letter()
            yield text.line, text.item()
            separator = text.next_letter()
            if separator not in (",", "]"):
                reason = (
                    f"{separator!r} where a comma or ] is expected"
                    if separator
                    else "the list does not end"
                )
                raise _MalformedFileError(f"{text.line}: invalid JSON ({reason})")
            last = separator == "]"
            text.step()
    if text.next_letter():
        raise _MalformedFileError(f"{text.line}: there is content after the end of the list")


class _JsonReader:
    """A cursor in a JSON file that is read in chunks, with its line number."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._position = file, "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        self.line = 1

    def next_letter(self) -> str:
        """The next character that is not white space, without consuming it; empty at the end of the
        file.
        """
        while True:
            while self._position < len(self._text):
                letter = self._text[self._position]
                if letter not in " \t\r\n":
                    return letter
                self.step()
            if not self._read_more():
                return ""

    def step(self) -> None:
        """Consume one character."""
        self.line += self._text[self._position] == "\n"
        self._position += 1

    def item(self) -> Any:
        """Parse the JSON value at the cursor. Raises ``_MalformedFileError`` if it is invalid."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                problem = "the list does not end"
            except SteerError as error:
                raise _MalformedFileError(f"{self.line}: {error}") from None
            except (ValueError, RecursionError) as error:
                end, problem = len(self._text), _cause(error)
            # A number at the end of a chunk may continue in the next one.
            if end < len(self._text):
                self.line += self._text.count("\n", self._position, end)
                self._position = end
                return value
            if len(self._text) - self._position > _LONGEST:
                raise _MalformedFileError(
                    f"{self.line}: invalid JSON within {_LONGEST} characters ({problem})"
                )
            if not self._read_more():
                raise _MalformedFileError(f"{self.line}: invalid JSON ({problem})")

    def _read_more(self) -> bool:
        """Read as much as is unparsed, so that a long item is parsed only a few times."""
        unread = self._text[self._position :]
        chunk = self._file.read(max(_CHUNK, len(unread)))
        self._text, self._position = unread + chunk, 0
        return bool(chunk)


def _csv(file: IO[str]) -> Iterator[tuple[int, Any]]:
    return _table(file, ",")


def _tsv(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, values in _table(file, "\t"):
        if isinstance(values, dict) and any(set("\t\r\n") & set(v) for v in values.values()):
            values = _BadRow(
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
                yield line, _BadRow(f"{len(values)} values; the first line names {len(names)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise _MalformedFileError(f"{line}: invalid CSV ({error})") from None


def _names(line: int, names: list[str]) -> list[str]:
    if any(map(_broken, names)):
        raise _MalformedFileError(f"{line}: {_BROKEN}")
    if len(set(names)) < len(names) or not all(names):
        raise _MalformedFileError(
            f"{line}: the first line must name each column once; it is {shown(names, 200)}"
        )
    return names


def _txt(file: IO[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(file):
        if text.strip():
            text = text.rstrip("\r\n")
            is_labelled = text.lstrip().startswith(_FASTTEXT)
            yield line, _fasttext_row(text) if is_labelled else {"text": text}


def _fasttext_row(line: str) -> Any:
    label, *rest = line.split(maxsplit=1)
    text = "".join(rest)
    name = label.removeprefix(_FASTTEXT)
    if not name:
        return _BadRow(f"a label has no name; expected {_FASTTEXT}NAME and a text")
    if others := [word for word in text.split() if word.startswith(_FASTTEXT)]:
        return _BadRow(
            f"it has {1 + len(others)} labels, {shown(label)} and {shown(others[0])}; expected one "
            "label at its beginning"
        )
    return {"label": name, "text": text}


_READERS: Final[Mapping[str, Callable[[IO[str]], Iterator[tuple[int, Any]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
}
SUFFIXES: Final = tuple(_READERS)
