"""From any form of a ``steer`` value to names and their options."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerRequestError
from vllm_steer.request.dynamic import dynamic_options
from vllm_steer.request.values import key_name, shown

Options = Mapping[Any, Any]

_ALLOWED = (
    "a string such as 'detox:5,humor', a JSON object in a string, or a dict such as {'detox': 5}"
)


def parse(asked: Any) -> Iterator[tuple[str, Options]]:
    """Each name with the options given, none where it stands alone."""
    if isinstance(asked, str):
        text = asked.strip()
        if text.startswith("{"):
            yield from _parse_dict(_from_json(text))
        elif text.startswith("["):
            raise SteerRequestError(f"steer is {shown(text)}; allowed: {_ALLOWED}")
        elif text not in ("", NO_STEER):
            yield from map(_parse_part, text.split(","))
    elif isinstance(asked, Mapping):
        yield from _parse_dict(asked)
    else:
        raise SteerRequestError(f"steer is {shown(asked)}; allowed: {_ALLOWED}")


def options_of(name: str, given: Any) -> Options:
    """One steer's options from what stands beside its name: options, a strength, ``dynamic``."""
    if isinstance(given, Mapping):
        return given
    dynamic = dynamic_options(name, given)
    return {"strength": given} if dynamic is None else dynamic


def _from_json(text: str) -> Options:
    try:
        value: Options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteerRequestError(f"steer {shown(text)} is not JSON: {error}") from None
    return value


def _parse_part(part: str) -> tuple[str, Options]:
    name, colon, strength = (piece.strip() for piece in part.partition(":"))
    if not name or (colon and not strength):
        raise SteerRequestError(f"steer has an incomplete part {shown(part)}; allowed: {_ALLOWED}")
    return name, options_of(name, strength) if colon else {}


def _parse_dict(asked: Options) -> Iterator[tuple[str, Options]]:
    for key, given in asked.items():
        name = key_name(key)
        yield name, options_of(name, given)
