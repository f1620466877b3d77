"""Parses any form of a ``steer`` value into names and options."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.files.json_text import each_once
from vllm_steer.foreign import shown
from vllm_steer.request.ceilings import SPACES, check_object, check_text
from vllm_steer.request.dynamic import dynamic_options
from vllm_steer.request.values import key_name

Options = Mapping[Any, Any]

ALLOWED = (
    "a string such as 'detox:5,humor', a JSON object in a string, or a dict such as {'detox': 5}"
)


def parse(asked: Any) -> Iterator[tuple[str, Options]]:
    """Each name with the options given, none where it stands alone.

    Raises ``SteerRequestError``, before it reads any of it, for a value above the ceilings.
    """
    if isinstance(asked, str):
        check_text(asked)
        yield from _parse_text(asked.strip(SPACES))
    elif isinstance(asked, Mapping):
        check_object(asked)
        yield from _parse_dict(asked)
    else:
        raise SteerRequestError(f"steer is {shown(asked)}; allowed: {ALLOWED}")


def options_of(name: str, given: Any) -> Options:
    """One steer's options from what stands beside its name: options, a strength, ``dynamic``."""
    if isinstance(given, Mapping):
        return given
    dynamic = dynamic_options(name, given)
    return {"strength": given} if dynamic is None else dynamic


def _parse_text(text: str) -> Iterator[tuple[str, Options]]:
    if text.startswith("{"):
        asked = _from_json(text)
        check_object(asked)
        yield from _parse_dict(asked)
    elif text.startswith("["):
        raise SteerRequestError(f"steer is {shown(text)}; allowed: {ALLOWED}")
    elif text not in ("", NO_STEER):
        yield from map(_parse_part, text.split(","))


def _from_json(text: str) -> Options:
    try:
        value: Options = json.loads(text, object_pairs_hook=each_once)
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


def _parse_dict(asked: Options) -> Iterator[tuple[str, Options]]:
    for key, given in asked.items():
        name = key_name(key)
        yield name, options_of(name, given)
