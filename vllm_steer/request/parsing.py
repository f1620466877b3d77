"""Parses any form of a ``steer`` value into names and options."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.files.json_text import unique_keys
from vllm_steer.request.dynamic import dynamic_options
from vllm_steer.request.value_limits import SPACES, check_object, check_text
from vllm_steer.request.values import key_name
from vllm_steer.untrusted_text import shown

Options = Mapping[Any, Any]

ALLOWED = (
    "a string such as 'detox:5,humor', a JSON object in a string, or a dict such as {'detox': 5}"
)


def parse(value: Any) -> Iterator[tuple[str, Options]]:
    """Parse a value to names and their options; a name alone has no options.

    Raises ``SteerRequestError`` for a value above the limits, before parsing it.
    """
    if isinstance(value, str):
        check_text(value)
        yield from _parse_text(value.strip(SPACES))
    elif isinstance(value, Mapping):
        check_object(value)
        yield from _parse_dict(value)
    else:
        raise SteerRequestError(f"steer is {shown(value)}; allowed: {ALLOWED}")


def options_of(name: str, value: Any) -> Options:
    """The options of a steer from its value: options, a strength, or ``dynamic``."""
    if isinstance(value, Mapping):
        return value
    dynamic = dynamic_options(name, value)
    return {"strength": value} if dynamic is None else dynamic


def _parse_text(text: str) -> Iterator[tuple[str, Options]]:
    if text.startswith("{"):
        parsed = _from_json(text)
        check_object(parsed)
        yield from _parse_dict(parsed)
    elif text.startswith("["):
        raise SteerRequestError(f"steer is {shown(text)}; allowed: {ALLOWED}")
    elif text not in ("", NO_STEER):
        yield from map(_parse_part, text.split(","))


def _from_json(text: str) -> Options:
    try:
        value: Options = json.loads(text, object_pairs_hook=unique_keys)
    except SteerError as error:
        raise SteerRequestError(f"steer {shown(text)}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SteerRequestError(f"steer {shown(text)} is not JSON: {error}") from None
    return value


def _parse_part(part: str) -> tuple[str, Options]:
    name, colon, strength = (piece.strip(SPACES) for piece in part.partition(":"))
    if not name or (colon and not strength):
        raise SteerRequestError(f"steer has an incomplete part {shown(part)}; allowed: {ALLOWED}")
    return name, options_of(name, strength) if colon else {}


def _parse_dict(parsed: Options) -> Iterator[tuple[str, Options]]:
    for key, value in parsed.items():
        name = key_name(key)
        yield name, options_of(name, value)
