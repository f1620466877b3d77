"""Rejects misspelled steer fields, which vLLM would ignore and serve unsteered.

The check compares exact names, and ignores null values. ``extra_body`` is an argument of the OpenAI
client; ``extra_args`` and ``sampling_params`` are arguments of ``LLM``. Only one of vLLM's HTTP
routes reads them, so a steer inside them is rejected on the others.
"""

from collections.abc import Iterable
from typing import Final

from vllm_steer.serving.http.bad_request import BadRequest
from vllm_steer.serving.http.json_members import NULL, MemberReader, Members
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.request_args import STREAM, STRENGTHS

ARGUMENT_MISSPELLINGS: Final = {
    **dict.fromkeys(("steers", "Steer", "STEER", "Steers", "STEERS"), "steer"),
    **dict.fromkeys(("steer_strength", "steerStrengths"), STRENGTHS),
}
BODY_MISSPELLINGS: Final = {
    **ARGUMENT_MISSPELLINGS,
    **dict.fromkeys(("steering", "Steering", "steer_config", "steerConfig"), "steer"),
}
CLIENT_ONLY_FIELDS: Final = ("extra_body", "extra_args", "sampling_params")
_ARGUMENTS: Final = ("vllm_xargs", "extra_args")
_EXAMPLE: Final = {"steer": '"steer": "detox:5,humor"', STRENGTHS: f'"{STRENGTHS}": true'}
_STEER_FIELDS: Final = ("steer", STRENGTHS, *BODY_MISSPELLINGS)
_INNER: Final = MemberReader((*_STEER_FIELDS, STREAM, *_ARGUMENTS))
EXTRA_ARGS: Final = "sampling_params.extra_args"


def check_names(body: Members, arguments: Members, route: Route) -> None:
    """Raise ``BadRequest`` for a misspelled steer field in a body or in its ``vllm_xargs``."""
    for prefix, members, names in (
        ("", body, BODY_MISSPELLINGS),
        ("vllm_xargs.", arguments, ARGUMENT_MISSPELLINGS),
    ):
        for name, correct in names.items():
            if _is_set(members, name):
                raise _misspelled(f"{prefix}{name}", correct, route)
    for field in CLIENT_ONLY_FIELDS:
        if field in body:
            _check_client_field(field, body[field], route)


def _check_client_field(field: str, text: bytes, route: Route) -> None:
    inner = _INNER.read(text)
    if name := _first_of(_STEER_FIELDS, inner):
        raise _misspelled(f"{field}.{name}", BODY_MISSPELLINGS.get(name, name), route)
    for arguments in _ARGUMENTS:
        is_read = f"{field}.{arguments}" == EXTRA_ARGS and route.has_extra_args
        names = tuple(ARGUMENT_MISSPELLINGS) if is_read else _STEER_FIELDS
        if name := _first_of(names, _INNER.read(inner.get(arguments, NULL))):
            correct = BODY_MISSPELLINGS.get(name, name)
            raise _misspelled(f"{field}.{arguments}.{name}", correct, route)


def extra_args_of(body: Members) -> tuple[bytes, Members]:
    """``sampling_params.extra_args`` as JSON, and its steering members."""
    params = _INNER.read(body.get("sampling_params", NULL))
    text = params.get("extra_args", NULL)
    return text, _INNER.read(text)


def _first_of(names: Iterable[str], members: Members) -> str | None:
    return next((name for name in names if _is_set(members, name)), None)


def _is_set(members: Members, name: str) -> bool:
    return members.get(name, NULL) != NULL


def _misspelled(field: str, correct: str, route: Route) -> BadRequest:
    return BadRequest(
        f"{field} is not a field of this server; use {correct}, in the body itself, such as "
        f"{_EXAMPLE[correct]}, or in {EXTRA_ARGS if route.has_extra_args else 'vllm_xargs'}",
        field,
    )
