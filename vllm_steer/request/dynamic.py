"""Options of a dynamic strength in a request: maximum, top_p and kl."""

from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.config import DYNAMIC
from vllm_steer.doses import KLS, Dynamic
from vllm_steer.errors import SteerRequestError
from vllm_steer.request.value_limits import SPACES
from vllm_steer.request.values import choice, number
from vllm_steer.untrusted_text import name as named
from vllm_steer.untrusted_text import shown

DYNAMIC_OPTIONS: Final = ("max", "top_p", "kl")
DEFAULT_MAX: Final = 2.0


def dynamic_options(name: str, value: Any) -> dict[str, str] | None:
    """Expand ``dynamic``, ``dynamic:MAX`` or ``dynamic:MAX:TOP_P`` to options; None for other
    values.
    """
    pieces = [piece.strip(SPACES) for piece in value.split(":")] if isinstance(value, str) else []
    if DYNAMIC not in pieces[:1]:
        return None
    if len(pieces) > 3 or "" in pieces:
        raise SteerRequestError(
            f"steer {named(name)} has strength {shown(value)}; after 'dynamic' a maximum may "
            f"follow, and after that a top_p, such as {named(name)}:dynamic:1.5:0.6"
        )
    return dict(zip(("strength", "max", "top_p"), pieces, strict=False))


def requests_dynamic(name: str, options: Mapping[Any, Any]) -> bool:
    """True if the strength is dynamic.

    Raises ``SteerRequestError`` for options that cannot be combined with that.
    """
    if options.get("schedule") == DYNAMIC:
        if "strength" in options:
            raise SteerRequestError(
                f"steer {name} has schedule 'dynamic' and a strength: the schedule stands for "
                "strength 'dynamic'; drop it, and give the largest strength as max"
            )
    elif options.get("strength") != DYNAMIC:
        dynamic_only = [option for option in DYNAMIC_OPTIONS if options.get(option) is not None]
        if dynamic_only:
            raise SteerRequestError(
                f"steer {name} has {', '.join(dynamic_only)}, which only a dynamic strength has; "
                "ask for "
                f"strength 'dynamic', or drop {'it' if len(dynamic_only) == 1 else 'them'}"
            )
        return False
    elif options.get("schedule") is not None:
        raise SteerRequestError(
            f"steer {name} has schedule {shown(options['schedule'])} and strength 'dynamic', which "
            "is computed anew at every step; drop one"
        )
    if options.get("phase") is not None:
        raise SteerRequestError(
            f"steer {name} has phase {shown(options['phase'])} and a dynamic strength, which "
            "begins at the last prompt token, with the first token to be chosen; drop one"
        )
    return True


def read_dynamic(name: str, options: Mapping[Any, Any]) -> tuple[float, Dynamic]:
    """The maximum, whose sign is the direction, and the other options of a dynamic strength."""
    return _maximum(name, options.get("max")), Dynamic(
        top_p=_top_p(name, options.get("top_p")),
        kl=Dynamic.kl if options.get("kl") is None else choice(name, "kl", options["kl"], KLS),
    )


def _maximum(name: str, value: Any) -> float:
    if value is None:
        return DEFAULT_MAX
    maximum = number(name, "max", value, expected="such as 2, or -2 for the opposite direction")
    if maximum == 0:
        raise SteerRequestError(
            f"steer {name} has max {shown(value)}: its strengths would all be 0; give another, "
            "or leave the steer away"
        )
    return maximum


def _top_p(name: str, value: Any) -> float:
    if value is None:
        return Dynamic.top_p
    top_p = number(name, "top_p", value, expected="above 0 and at most 1")
    if not 0 < top_p <= 1:
        raise SteerRequestError(
            f"steer {name} has top_p {shown(value)}; it must be above 0 and at most 1"
        )
    return top_p
