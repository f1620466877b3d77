"""Field names close to ours: refused, because vLLM would ignore them and serve unsteered.

Exact names only, and only where they hold anything. ``extra_body`` is the OpenAI client's argument
and ``extra_args`` and ``sampling_params`` are those of ``LLM``: none of vLLM's HTTP routes but one
reads them, and they are answered only if a steer is in them.
"""

from collections.abc import Iterable
from typing import Final

from vllm_steer.serving.http.members import NULL, Members, Reader
from vllm_steer.serving.http.refusal import Refused
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.request_args import STREAM, STRENGTHS

MEANT_INSIDE: Final = {
    **dict.fromkeys(("steers", "Steer", "STEER", "Steers", "STEERS"), "steer"),
    **dict.fromkeys(("steer_strength", "steerStrengths"), STRENGTHS),
}
MEANT: Final = {
    **MEANT_INSIDE,
    **dict.fromkeys(("steering", "Steering", "steer_config", "steerConfig"), "steer"),
}
HOLDERS: Final = ("extra_body", "extra_args", "sampling_params")
_ARGUMENTS: Final = ("vllm_xargs", "extra_args")
_EXAMPLE: Final = {"steer": '"steer": "detox:5,humor"', STRENGTHS: f'"{STRENGTHS}": true'}
_OURS: Final = ("steer", STRENGTHS, *MEANT)
_INNER: Final = Reader((*_OURS, STREAM, *_ARGUMENTS))
EXTRA_ARGS: Final = "sampling_params.extra_args"


def check_names(body: Members, arguments: Members, route: Route) -> None:
    """Raise ``Refused`` for a name that is nearly ours, in a body or in its ``vllm_xargs``."""
    for place, members, names in (("", body, MEANT), ("vllm_xargs.", arguments, MEANT_INSIDE)):
        for name, meant in names.items():
            if _is_given(members, name):
                raise _meant(f"{place}{name}", meant)
    for holder in HOLDERS:
        if holder in body:
            _check_holder(holder, body[holder], route)


def _check_holder(holder: str, text: bytes, route: Route) -> None:
    inner = _INNER.read(text)
    if found := _first_of(_OURS, inner):
        raise _meant(f"{holder}.{found}", MEANT.get(found, found))
    for arguments in _ARGUMENTS:
        is_read = f"{holder}.{arguments}" == EXTRA_ARGS and route.has_extra_args
        names = tuple(MEANT_INSIDE) if is_read else _OURS
        if found := _first_of(names, _INNER.read(inner.get(arguments, NULL))):
            raise _meant(f"{holder}.{arguments}.{found}", MEANT.get(found, found))


def extra_args_of(body: Members) -> Members:
    """The members of ``sampling_params.extra_args``, on the route that has them."""
    params = _INNER.read(body.get("sampling_params", NULL))
    return _INNER.read(params.get("extra_args", NULL))


def _first_of(names: Iterable[str], members: Members) -> str | None:
    return next((name for name in names if _is_given(members, name)), None)


def _is_given(members: Members, name: str) -> bool:
    return members.get(name, NULL) != NULL


def _meant(place: str, meant: str) -> Refused:
    return Refused(
        f"{place} is not read by this server; {meant} is, as a field of the body itself, such as "
        f"{_EXAMPLE[meant]}, or in vllm_xargs",
        place,
    )
