"""Layer numbers: decoder blocks of a model, counted from 0."""

import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import LONGEST_LIST, printable, shown

_MAX_LAYERS = 10_000
_NUMBER = re.compile(r"0|[1-9][0-9]{0,4}")


def parse_layers(value: Any) -> tuple[int, ...]:
    """Ascending 0-based layers from ``"8-31"``, ``"3,7,9"``, ``"0-3,8"``, ``7`` or ``[3, 7]``.

    Raises ``SteerError`` for anything else, for a layer named twice and for an empty list.
    """
    if isinstance(value, str):
        spans: Iterable[Iterable[int]] = (_span(part, value) for part in value.split(","))
    else:
        items = value if isinstance(value, Sequence) else [value]
        spans = ([_number(item, value)] for item in items)
    layers: set[int] = set()
    for span in spans:
        if not layers.isdisjoint(
            span
        ):  # checked first: a short text can describe billions of layers
            raise _malformed(value)
        layers.update(span)
    if not layers:
        raise _malformed(value)
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """``(0, 1, 2, 7)`` as ``"0-2,7"``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def check_layers(layers: Sequence[int], count: int, tensor: str) -> None:
    """Raise ``SteerError`` unless there are ``count`` ascending layers, one per row of a tensor."""
    if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
        raise SteerError(
            f"layers {shown(list(layers))}: expected ascending 0-based layers, each once"
        )
    if len(layers) != count:
        raise SteerError(
            f"tensor {tensor} has {count} layers and layers names {len(layers)} "
            f"({format_layers(layers)}); they must be equal"
        )


def positions_of(requested: Sequence[int], layers: Sequence[int]) -> list[int]:
    """The index of each requested layer in ``layers``; ``SteerError`` for a missing one."""
    index_of = {layer: index for index, layer in enumerate(layers)}
    missing = sorted(set(requested) - set(index_of))
    if missing:
        raise SteerError(f"layers {_short(missing)} are not in this steer; it has {_short(layers)}")
    return [index_of[layer] for layer in requested]


def _short(layers: Iterable[int]) -> str:
    return printable(format_layers(layers), LONGEST_LIST)


def _span(part: str, value: Any) -> range:
    first, dash, last = part.partition("-")
    start = _number(first, value)
    stop = _number(last, value) if dash else start
    if stop < start:
        raise _malformed(value)
    return range(start, stop + 1)


def _number(item: Any, value: Any) -> int:
    if isinstance(item, str):
        text = item.strip(" \t\r\n")
        item = int(text) if _NUMBER.fullmatch(text) else None
    if isinstance(item, bool) or not isinstance(item, Integral) or not 0 <= int(item) < _MAX_LAYERS:
        raise _malformed(value)
    return int(item)


def _malformed(value: Any) -> SteerError:
    return SteerError(
        f"layers is {shown(value)}; expected 0-based layers such as '8-31', '3,7,9' or [3, 7]"
    )
