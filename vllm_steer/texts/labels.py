"""Label maps: from what a data set calls its classes to strengths in [-1, 1]."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import is_number, shown

LabelMap = Callable[[Any], float]

# As the LM-Steer authors' training script maps them; their yelp map is not symmetric.
LABEL_MAPS: Final[Mapping[str, Mapping[str, float]]] = {
    "sst2": {"0": -1.0, "1": 1.0},
    "sst5": {"0": -1.0, "1": -0.5, "2": 0.0, "3": 0.5, "4": 1.0},
    "yelp": {"0": -1.0, "1": -0.6, "2": -0.2, "3": 0.2, "4": 0.6},
    "toxicity": {"0": 1.0, "1": -1.0},
}


def label_map(given: str | None) -> LabelMap:
    """The label of a value: by a known map, by pairs such as ``good=1,bad=-1``, or as it stands.

    Raises ``SteerError`` for a map that is neither; what is returned, for a value that the map does
    not have, or that is no number in [-1, 1].
    """
    if given is None:
        return _number
    table = LABEL_MAPS.get(given) or _pairs(given)

    def mapped(value: Any) -> float:
        for key in _keys(value):
            if key in table:
                return table[key]
        raise SteerError(f"label {shown(value)} is not in the label map; it has {_all(table)}")

    return mapped


def _keys(value: Any) -> tuple[str, ...]:
    """What a value may be called in a map: a float column writes 1 as 1.0, JSON True as true."""
    text = str(value).strip()
    return (text, text.lower()) if isinstance(value, bool) else (text, text.removesuffix(".0"))


def _pairs(given: str) -> dict[str, float]:
    table: dict[str, float] = {}
    for pair in given.split(","):
        name, _, value = (part.strip() for part in pair.rpartition("="))
        if not name:
            raise SteerError(
                f"label map {shown(given)}: wanted one of {', '.join(LABEL_MAPS)}, or pairs such "
                "as good=1,bad=-1"
            )
        if name in table:
            raise SteerError(
                f"label map {shown(given)}: {name} is there twice; give each label once"
            )
        table[name] = _number(value)
    return table


def _all(table: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in table.items())


def _number(value: Any) -> float:
    try:
        is_none = isinstance(value, bool) or (isinstance(value, str) and not is_number(value))
        number = float("nan") if is_none else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not -1 <= number <= 1:
        raise SteerError(
            f"label {shown(value)} is no number in [-1, 1]; give a label map such as good=1,bad=-1"
        )
    return number
