"""Reads JSON of untrusted files strictly and within size limits, and writes JSON."""

import json
import math
from pathlib import Path
from typing import Any

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.size_limits import MAX_HEADER_BYTES, check_nesting
from vllm_steer.untrusted_text import shown


class NotJSONError(SteerError):
    """The text is not JSON."""


def read_json(text: str, subject: str) -> Any:
    """Parse a JSON text; ``subject`` names it in error messages.

    Raises ``NotJSONError`` for a text that is not JSON. Raises ``SteerError`` for values that are
    nested too deep or too many, and for content that JSON parsers interpret differently: a
    duplicate key, NaN, an infinity, or a whole number of more than 20 digits.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_reject_constant,
            parse_int=_whole_number,
            parse_float=_number,
        )
    except SteerError as error:
        raise SteerError(f"{subject}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise NotJSONError(f"{subject} is not JSON ({cause(error)})") from None
    check_nesting(value, subject)
    if "\\u" in text and not _is_unicode(value):
        raise SteerError(f"{subject}: a string has characters that are not valid Unicode")
    return value


def read_json_object(path: Path, subject: str) -> dict[str, Any]:
    """The JSON object in a small file; ``SteerError`` for other content, as in ``read_json``."""
    with path.open("rb") as file:
        data = file.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise SteerError(f"{subject} has more than {MAX_HEADER_BYTES} bytes, the limit")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise NotJSONError(f"{subject} is not JSON ({cause(error)})") from None
    value = read_json(text, subject)
    if not isinstance(value, dict):
        raise SteerError(f"{subject} is {shown(value)}; expected a JSON object")
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Serialize plain data as JSON in valid UTF-8, without escaping non-ASCII letters."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # A lone surrogate is not valid UTF-8; its escape is the same JSON string.
    return text.encode("utf-8", "backslashreplace").decode()


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object as a dict; ``SteerError`` for a duplicate key."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise SteerError(f"the key {shown(key)} is given twice")
        result[key] = value
    return result


def _reject_constant(text: str) -> Any:
    raise SteerError(f"{text} is not a JSON number")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise SteerError(f"the number {shown(text)} is too large")
    return number


def _whole_number(text: str) -> int:
    if len(text) > 20:
        raise SteerError(f"a whole number of {len(text)} digits; at most 20 are read")
    return int(text)
