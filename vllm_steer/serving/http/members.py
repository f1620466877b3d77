"""The members of a JSON object that matter, as the bytes they are; all others are skipped.

msgspec skips what it is not asked for, in a fraction of the time that building it takes. It reads
keys with escapes and of several members with one name the last, as ``json`` does. Where it refuses
a text, ``json`` is asked, which vLLM reads bodies with: it also takes NaN, lone surrogates, a byte
order mark, UTF-16 and UTF-32.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from vllm_steer.serving.http.refusal import Refused

Members = Mapping[str, bytes]

NULL: Final = b"null"


class Slow(Exception):
    """msgspec cannot read this; ``Reader.read_slowly`` may."""


class Read(NamedTuple):
    """Members, None if the text is no object, and the text in UTF-8 where it came in another."""

    members: dict[str, bytes] | None
    text: bytes | None = None


class Reader:
    """Reads the members with certain names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(dict.fromkeys(names))
        fields = [(name, msgspec.Raw, msgspec.Raw()) for name in self._names]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Members", fields))

    def read(self, text: bytes) -> dict[str, bytes]:
        """The members of an object inside a body; none of what is no object."""
        try:
            return self.read_fast(text) or {}
        except Slow:
            return self.read_slowly(text).members or {}

    def read_fast(self, text: bytes) -> dict[str, bytes] | None:
        """The members, None if the text is no object. Raises ``Slow`` if msgspec refuses it."""
        try:
            found = self._decoder.decode(text)
        except msgspec.ValidationError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise Slow from None
        values = {name: bytes(getattr(found, name)) for name in self._names}
        return {name: value for name, value in values.items() if value}

    def read_slowly(self, text: bytes) -> Read:
        """The same through ``json``; None also for what vLLM will answer as malformed.

        Raises ``Refused`` for one of the members that is too deep to be written.
        """
        try:
            data = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            return Read(None)
        if not isinstance(data, dict):
            return Read(None)
        members = {name: _written(name, data[name]) for name in self._names if name in data}
        encoding = json.detect_encoding(text)
        if encoding.startswith("utf-8"):
            return Read(members)
        recoded = text.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
        return Read(members, recoded)


class _Twice(dict[str, Any]):
    """An object in which a key was given twice; the last one counts, as in ``json``."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Twice(made)


def _has_twice(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value, _Twice) or any(map(_has_twice, value.values()))
    return isinstance(value, list) and any(map(_has_twice, value))


def _written(name: str, value: Any) -> bytes:
    """A member in ``json``'s notation, which tells no more of a key that was given twice."""
    steer = value if name == "steer" else value.get("steer") if isinstance(value, dict) else None
    try:
        if _has_twice(steer):
            raise Refused(f"{name}: a key of the steer is given twice; give it once", name)
        return json.dumps(value).encode()
    except RecursionError:
        raise Refused(f"{name} is nested too deep", name) from None
