"""Extracts some members of a JSON object as raw bytes and skips all others.

msgspec skips members that are not declared, which is much faster than parsing them. It handles
escaped keys and duplicate names (the last one counts) as ``json`` does. If msgspec rejects a text,
``json`` parses it, as vLLM does: it also accepts NaN, lone surrogates, a byte-order mark, UTF-16
and UTF-32.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from vllm_steer.serving.http.bad_request import BadRequest

Members = Mapping[str, bytes]

NULL: Final = b"null"


class MsgspecRefused(Exception):
    """msgspec cannot parse the text; ``MemberReader.read_slowly`` may."""


class ParsedBody(NamedTuple):
    """The members (None if the text is not an object), and the text if it was recoded to UTF-8."""

    members: dict[str, bytes] | None
    text: bytes | None = None


class MemberReader:
    """Extracts the members with the given names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(dict.fromkeys(names))
        fields = [(name, msgspec.Raw, msgspec.Raw()) for name in self._names]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Members", fields))

    def read(self, text: bytes) -> dict[str, bytes]:
        """The members of an object inside a body; empty if it is not an object."""
        try:
            return self.read_fast(text) or {}
        except MsgspecRefused:
            return self.read_slowly(text).members or {}

    def read_fast(self, text: bytes) -> dict[str, bytes] | None:
        """The members, None if the text is no object. Raises ``MsgspecRefused`` if msgspec refuses
        it.
        """
        try:
            decoded = self._decoder.decode(text)
        except msgspec.ValidationError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise MsgspecRefused from None
        values = {name: bytes(getattr(decoded, name)) for name in self._names}
        return {name: value for name, value in values.items() if value}

    def read_slowly(self, text: bytes) -> ParsedBody:
        """The members, parsed by ``json``; None also for a body that vLLM rejects as malformed.

        Raises ``BadRequest`` for a member that is nested too deep or has duplicate keys.
        """
        try:
            data = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            return ParsedBody(None)
        if not isinstance(data, dict):
            return ParsedBody(None)
        members = {name: _to_json(name, data[name]) for name in self._names if name in data}
        encoding = json.detect_encoding(text)
        if encoding.startswith("utf-8"):
            return ParsedBody(members)
        recoded = text.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
        return ParsedBody(members, recoded)


class _DuplicateKeys(dict[str, Any]):
    """An object with duplicate keys; the last value of a key counts, as in ``json``."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _DuplicateKeys(members)


def _has_duplicate_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value, _DuplicateKeys) or any(map(_has_duplicate_keys, value.values()))
    return isinstance(value, list) and any(map(_has_duplicate_keys, value))


def _to_json(name: str, value: Any) -> bytes:
    """A member as JSON; ``BadRequest`` if its steer has duplicate keys, which JSON would drop."""
    steer = value if name == "steer" else value.get("steer") if isinstance(value, dict) else None
    try:
        if _has_duplicate_keys(steer):
            parameter = name if name == "steer" else f"{name}.steer"
            raise BadRequest(f"{parameter}: a key is given twice; give each key once", parameter)
        return json.dumps(value).encode()
    except RecursionError:
        raise BadRequest(f"{name} is nested too deep", name) from None
