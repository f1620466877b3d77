"""Label maps: from the class labels of a data set to values in [-1, 1]."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import is_number, shown

LabelMap = Callable[[Any], float]

_RANGE: Final = re.compile(r"([0-9]{1,3})\s*:\s*([0-9]{1,3})", re.ASCII)

# The maps of the LM-Steer authors' training script; their yelp map is not symmetric. All begin at
# label 0.
LABEL_MAPS: Final[Mapping[str, Mapping[str, float]]] = {
    "sst2": {"0": -1.0, "1": 1.0},
    "sst5": {"0": -1.0, "1": -0.5, "2": 0.0, "3": 0.5, "4": 1.0},
    "yelp": {"0": -1.0, "1": -0.6, "2": -0.2, "3": 0.2, "4": 0.6},
    "toxicity": {"0": 1.0, "1": -1.0},
}


def label_map(spec: str | None) -> LabelMap:
    """A function from labels to [-1, 1]: a named map, pairs such as ``good=1,bad=-1``, a range of
    whole numbers such as ``1:5``, which are spread evenly from -1 to 1, or the identity.

    Raises ``SteerError`` for an invalid map; the function raises it for a label that is not in the
    map or not a number in [-1, 1].
    """
    if spec is None:
        return _number
    table = LABEL_MAPS.get(spec) or _spread(spec) or _pairs(spec)

    def mapped(value: Any) -> float:
        for key in _keys(value):
            if key in table:
                return table[key]
        raise SteerError(
            f"label {shown(value)} is not in the label map; it has {_all(table)}"
            f"{_hint(value, table)}"
        )

    return mapped


def _keys(value: Any) -> tuple[str, ...]:
    """The possible keys of a value: a float column writes 1 as 1.0, JSON True as true."""
    text = str(value).strip()
    return (text, text.lower()) if isinstance(value, bool) else (text, text.removesuffix(".0"))


def _hint(value: Any, table: Mapping[str, float]) -> str:
    """What to give if a label is one more than the last of a map that begins at 0."""
    from_zero = [str(label) for label in range(len(table))]
    if list(table) != from_zero or str(len(table)) not in _keys(value):
        return ""
    shifted = {str(int(label) + 1): number for label, number in table.items()}
    return f"; if the labels begin at 1, give {_all(shifted, ',')}"


def _spread(spec: str) -> dict[str, float]:
    """The numbers of a range; empty if the map is none.

    ``label = -1 + 2 (n - first) / (last - first)``
    """
    match = _RANGE.fullmatch(spec.strip())
    if match is None:
        return {}
    first, last = map(int, match.groups())
    if first >= last:
        raise SteerError(
            f"label map {shown(spec)}: expected the lowest and the highest label, such as 1:5"
        )
    return {str(n): -1 + 2 * (n - first) / (last - first) for n in range(first, last + 1)}


def _pairs(spec: str) -> dict[str, float]:
    table: dict[str, float] = {}
    for pair in spec.split(","):
        name, _, value = (part.strip() for part in pair.rpartition("="))
        if not name:
            raise SteerError(
                f"label map {shown(spec)}: expected one of {', '.join(LABEL_MAPS)}, a range such "
                "as 1:5, or pairs such as good=1,bad=-1"
            )
        if name in table:
            raise SteerError(
                f"label map {shown(spec)}: {name} is listed twice; give each label once"
            )
        table[name] = _number(value)
    return table


def _all(table: Mapping[str, float], separator: str = ", ") -> str:
    return separator.join(f"{name}={value:g}" for name, value in table.items())


def _number(value: Any) -> float:
    try:
        is_none = isinstance(value, bool) or (isinstance(value, str) and not is_number(value))
        number = float("nan") if is_none else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not -1 <= number <= 1:
        raise SteerError(
            f"label {shown(value)} is not a number in [-1, 1]; give a label map such as "
            "good=1,bad=-1, or 1:5 for labels 1 to 5"
        )
    return number
