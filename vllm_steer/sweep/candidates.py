"""Parsing of the layers to try."""

from dataclasses import dataclass
from typing import Final

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer, Steer, VectorSteer
from vllm_steer.steers.layers import format_layers, parse_layers, positions_of

_TOP: Final = "top:"
_ALL: Final = "all"


@dataclass(frozen=True)
class CandidateLayers:
    """A subset of a steer's layers and its name; ``layers`` is None for a steer at the LM head."""

    name: str
    layers: tuple[int, ...] | None


def parse_candidates(spec: str | None, steer: Steer) -> list[CandidateLayers]:
    """Candidates from ``"top:1,2,4;all;0-3"``; None means all layers of the steer.

    ``top:k`` are the ``k`` layers with the highest ``layer_scores``, the lower layer first for
    equal scores; ``all`` are all layers of the steer. Duplicates are dropped.

    Raises ``SteerError`` for layers that the steer does not have, for an LM-Steer, and for ``top``
    with a steer without scores.
    """
    if spec is None:
        return [CandidateLayers(_ALL, steer.layers)]
    if isinstance(steer, LMSteer):
        raise SteerError("layers does not apply to an LM-Steer, which acts at the LM head; drop it")
    unique: dict[tuple[int, ...] | None, CandidateLayers] = {}
    for part in spec.split(";"):
        for candidate in _candidates(part.strip(), steer):
            unique.setdefault(candidate.layers, candidate)
    return list(unique.values())


def _candidates(part: str, steer: Steer) -> list[CandidateLayers]:
    assert steer.layers is not None
    if part == _ALL:
        return [CandidateLayers(_ALL, tuple(steer.layers))]
    if part.startswith(_TOP):
        return [_top(count, steer) for count in part.removeprefix(_TOP).split(",")]
    layers = parse_layers(part)
    positions_of(layers, steer.layers)
    return [CandidateLayers(format_layers(layers), layers)]


def _top(text: str, steer: Steer) -> CandidateLayers:
    assert steer.layers is not None
    scores = steer.layer_scores if isinstance(steer, VectorSteer) else None
    if scores is None:
        raise SteerError(
            "top:k needs layer_scores, and the steer has none; name the layers, such as '0-3;4-7'"
        )
    count = int(text) if text.strip().isdecimal() and len(text) <= 5 else 0
    if not 1 <= count <= len(scores):
        raise SteerError(f"top:{text.strip()}: expected a number of layers from 1 to {len(scores)}")
    ranked = sorted(zip(scores, steer.layers, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return CandidateLayers(f"top:{count}", tuple(sorted(layer for _, layer in ranked[:count])))
