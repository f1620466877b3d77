"""Label maps: from the class labels of a data set to values in [-1, 1]."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import is_number, shown

LabelMap = Callable[[Any], float]

# The maps of the LM-Steer authors' training script; their yelp map is not symmetric.
LABEL_MAPS: Final[Mapping[str, Mapping[str, float]]] = {
    "sst2": {"0": -1.0, "1": 1.0},
    "sst5": {"0": -1.0, "1": -0.5, "2": 0.0, "3": 0.5, "4": 1.0},
    "yelp": {"0": -1.0, "1": -0.6, "2": -0.2, "3": 0.2, "4": 0.6},
    "toxicity": {"0": 1.0, "1": -1.0},
}


def label_map(spec: str | None) -> LabelMap:
    """A function from labels to [-1, 1]: a named map, pairs such as ``good=1,bad=-1``, or the
    identity.

    Raises ``SteerError`` for an invalid map; the function raises it for a label that is not in the
    map or not a number in [-1, 1].
    """
    if spec is None:
        return _number
    table = LABEL_MAPS.get(spec) or _pairs(spec)

    def mapped(value: Any) -> float:
        for key in _keys(value):
            if key in table:
                return table[key]
        raise SteerError(f"label {shown(value)} is not in the label map; it has {_all(table)}")

    return mapped


def _keys(value: Any) -> tuple[str, ...]:
    """The possible keys of a value: a float column writes 1 as 1.0, JSON True as true."""
    text = str(value).strip()
    return (text, text.lower()) if isinstance(value, bool) else (text, text.removesuffix(".0"))


def _pairs(spec: str) -> dict[str, float]:
    table: dict[str, float] = {}
    for pair in spec.split(","):
        name, _, value = (part.strip() for part in pair.rpartition("="))
        if not name:
            raise SteerError(
                f"label map {shown(spec)}: expected one of {', '.join(LABEL_MAPS)}, or pairs such "
                "as good=1,bad=-1"
            )
        if name in table:
            raise SteerError(
                f"label map {shown(spec)}: {name} is listed twice; give each label once"
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
            f"label {shown(value)} is not a number in [-1, 1]; give a label map such as "
            "good=1,bad=-1"
        )
    return number
