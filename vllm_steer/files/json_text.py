"""JSON out of a foreign file: bounded, and of one meaning; and JSON for a file."""

import json
import math
from typing import Any

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.bounds import check_nesting
from vllm_steer.foreign import shown


class NotJSONError(SteerError):
    """A text that is no JSON at all."""


def read_json(text: str, what: str) -> Any:
    """The value of a JSON text.

    Raises ``NotJSONError`` for a text that is no JSON, and ``SteerError``, with ``what`` as its
    name, for one that is nested too deep or holds too much, that names a key twice, or that holds
    NaN, an infinity or a whole number of more than 20 digits: readers do not agree on those.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=each_once,
            parse_constant=_no_constant,
            parse_int=_whole_number,
            parse_float=_number,
        )
    except SteerError as error:
        raise SteerError(f"{what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise NotJSONError(f"{what} is no JSON ({cause(error)})") from None
    check_nesting(value, what)
    if "\\u" in text and not _is_unicode(value):
        raise SteerError(f"{what}: a text has letters that are not Unicode")
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON for a file: letters of every script as they are, in valid UTF-8."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # Half a surrogate pair is no UTF-8; so escaped it is the same JSON text.
    return text.encode("utf-8", "backslashreplace").decode()


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members as a dict; ``SteerError`` for a key that is given twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SteerError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise SteerError(f"{text} is no JSON number")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise SteerError(f"the number {shown(text)} is too large")
    return number


def _whole_number(text: str) -> int:
    if len(text) > 20:
        raise SteerError(f"a whole number of {len(text)} digits; at most 20 are read")
    return int(text)
