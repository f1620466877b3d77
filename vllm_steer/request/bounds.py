"""Reads the options ``low`` and ``high``: the bounds of a projection or of an SAE's feature."""

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

from vllm_steer.errors import SteerRequestError
from vllm_steer.request.values import number
from vllm_steer.steers.checks import LARGEST
from vllm_steer.untrusted_text import shown

_UNBOUNDED: Final = {"inf": math.inf, "-inf": -math.inf}


class HasKind(Protocol):
    """A steer or a planned steer."""

    @property
    def kind(self) -> str: ...


def read_bounds(
    name: str, options: Mapping[Any, Any], steer: HasKind
) -> tuple[float | None, float | None]:
    """The bounds of a request, those of the steer where it gives none; None for a steer without.

    Raises ``SteerRequestError`` for bounds that are out of order or that the steer does not have.
    """
    has_bounds = bool(getattr(steer, "has_bounds", False))
    if not has_bounds:
        for option in ("low", "high"):
            if options.get(option) is not None:
                raise SteerRequestError(
                    f"steer {name} has {option} {shown(options[option])}, which only mode project "
                    "of a vector and mode clamp of an SAE's feature have; drop it"
                )
        return None, None
    low, high = (
        getattr(steer, option) if options.get(option) is None else _bound(name, option, options)
        for option in ("low", "high")
    )
    if not low <= high or low == math.inf or high == -math.inf:
        raise SteerRequestError(
            f"steer {name} has low {low:g} and high {high:g}; low must be at most high"
        )
    return low, high


def _bound(name: str, option: str, options: Mapping[Any, Any]) -> float:
    value = options[option]
    if isinstance(value, str) and value in _UNBOUNDED:
        return _UNBOUNDED[value]
    bound = number(name, option, value, expected="or 'inf' or '-inf' for no bound")
    if abs(bound) > LARGEST:
        raise SteerRequestError(
            f"steer {name} has {option} {shown(value)}, which is beyond the range of float32; "
            "'inf' or '-inf' is no bound"
        )
    return bound
