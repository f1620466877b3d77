"""Device tables of conditions: per site, the unit vectors of those that are read there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from vllm_steer.kernels.guidance import Conditions
from vllm_steer.kernels.guidance.operands import CAST, COSINE, DOT
from vllm_steer.steers import ConditionSteer
from vllm_steer.steers.sites import LAYER_SITES

_MEASURES: Final = {"cosine": COSINE, "dot": DOT, "cast": CAST}


@dataclass(frozen=True)
class ConditionEntry:
    """A condition's number in its table, and its layer."""

    number: int
    layer: int


@dataclass(frozen=True)
class ConditionTable:
    """The conditions of one site; ``layers`` are those of them that are on this rank."""

    site: str
    layers: tuple[int, ...]
    entries: Mapping[str, ConditionEntry]
    conditions: Conditions


def fill_condition_tables(
    conditions: Mapping[str, ConditionSteer], *, layers: Sequence[int], device: torch.device
) -> tuple[ConditionTable, ...]:
    """Put the conditions that are read in ``layers``, those of this rank, on the device."""
    tables = []
    for site in LAYER_SITES:
        here = {
            name: steer
            for name, steer in sorted(conditions.items())
            if steer.site == site and set(steer.layers) <= set(layers)
        }
        if here:
            tables.append(_table(site, here, device))
    return tuple(tables)


def _table(
    site: str, conditions: Mapping[str, ConditionSteer], device: torch.device
) -> ConditionTable:
    layers = tuple(sorted({steer.layers[0] for steer in conditions.values()}))
    width = next(iter(conditions.values())).hidden_size
    vectors = torch.zeros(len(layers), len(conditions), width)
    entries = {}
    for number, (name, steer) in enumerate(conditions.items()):
        (layer,) = steer.layers
        vector = steer.vector[0].double()
        vectors[layers.index(layer), number] = (vector / vector.norm()).float()
        entries[name] = ConditionEntry(number, layer)
    measures = [_MEASURES[steer.similarity] for steer in conditions.values()]
    signs = [1.0 if steer.side == "above" else -1.0 for steer in conditions.values()]
    thresholds = [steer.threshold for steer in conditions.values()]
    return ConditionTable(
        site,
        layers,
        entries,
        Conditions(
            vectors.to(device),
            torch.tensor(measures, dtype=torch.int32, device=device),
            torch.tensor(signs, device=device),
            torch.tensor(thresholds, dtype=torch.float32, device=device),
        ),
    )
