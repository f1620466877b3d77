"""Device tables of conditions: per site, the unit vectors of those that are read there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from vllm_steer.bank.layers import LayerRoom, SiteRoom
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
    """The conditions of one site; ``layers`` are those of this rank that they are read in, or may
    be.

    Numbers from ``first_reserved`` on are reserved for conditions that are loaded later; ``fill``
    writes them. The tensors keep their addresses.
    """

    site: str
    layers: tuple[int, ...]
    entries: dict[str, ConditionEntry]
    conditions: Conditions
    first_reserved: int = 0

    def fill(self, name: str, steer: ConditionSteer, index: int, vector: torch.Tensor) -> None:
        """Put a condition, with its ``unit_vector``, at a reserved number that no running step
        reads.
        """
        self._write(name, steer, self.first_reserved + index, vector)

    def remove(self, name: str) -> None:
        """Forget a condition; its number may be used again."""
        self.entries.pop(name, None)

    def _write(self, name: str, steer: ConditionSteer, number: int, vector: torch.Tensor) -> None:
        (layer,) = steer.layers
        tables = self.conditions
        tables.vectors[self.layers.index(layer), number].copy_(vector, non_blocking=True)
        tables.measure[number] = _MEASURES[steer.similarity]
        tables.sign[number] = 1.0 if steer.side == "above" else -1.0
        tables.threshold[number] = steer.threshold
        self.entries[name] = ConditionEntry(number, layer)


def fill_condition_tables(
    conditions: Mapping[str, ConditionSteer],
    *,
    layers: Sequence[int],
    device: torch.device,
    room: LayerRoom | None = None,
) -> tuple[ConditionTable, ...]:
    """Put the conditions that are read in ``layers``, those of this rank, on the device, and
    reserve room for others.
    """
    tables = []
    for site in LAYER_SITES:
        here = {
            name: steer
            for name, steer in sorted(conditions.items())
            if steer.site == site and set(steer.layers) <= set(layers)
        }
        reserved = SiteRoom(()) if room is None else room.sites.get(site, SiteRoom(()))
        if here or (reserved.conditions and reserved.layers):
            width = room.width if room is not None else next(iter(here.values())).hidden_size
            tables.append(_table(site, here, reserved, width, device))
    return tuple(tables)


def unit_vector(steer: ConditionSteer) -> torch.Tensor:
    """``[width]`` float32: what a condition compares with."""
    vector = steer.vector[0].double()
    return torch.as_tensor(vector / vector.norm(), dtype=torch.float32)


def _table(
    site: str,
    conditions: Mapping[str, ConditionSteer],
    reserved: SiteRoom,
    width: int,
    device: torch.device,
) -> ConditionTable:
    layers = {steer.layers[0] for steer in conditions.values()}
    layers.update(reserved.layers if reserved.conditions else ())
    count = len(conditions) + reserved.conditions
    tables = Conditions(
        vectors=torch.zeros(len(layers), count, width, device=device),
        measure=torch.full((count,), COSINE, dtype=torch.int32, device=device),
        sign=torch.ones(count, device=device),
        threshold=torch.zeros(count, device=device),
    )
    table = ConditionTable(site, tuple(sorted(layers)), {}, tables, len(conditions))
    for number, (name, steer) in enumerate(conditions.items()):
        table._write(name, steer, number, unit_vector(steer))
    return table
