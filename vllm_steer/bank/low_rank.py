"""Device tables of low-rank maps: per site, the packed factors of its steers in each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_steer.kernels.lm_steer import LowRank, SteerWeights
from vllm_steer.steers import LowRankSteer


class Factors(NamedTuple):
    """A map's A and B^T, both ``[L, ranks, width]`` float32; zeros in layers that it lacks."""

    shrink: torch.Tensor
    expand: torch.Tensor


class MapRoom(NamedTuple):
    """Room for maps that are loaded later: ``maps`` of up to ``ranks`` ranks and ``width``, whose
    directions begin at ``first_direction``.
    """

    maps: int
    ranks: int
    width: int
    first_direction: int


@dataclass(frozen=True)
class LowRankTable:
    """The low-rank maps of one site, in the operands of LM-Steer: ``x A^T`` and ``B^T``.

    slots    from names to slots, the same in every layer
    weights  per layer of the site's table, with zeros where a steer does not act
    factors  those of all layers, of which ``weights`` are views
    slot_of_direction   ``[D]`` int32, the slot of the steer that a direction belongs to; -1: none
    bounds   ``[S, 3]`` int32, each slot's start, fixed and end
    first_reserved   the first of the slots that ``fill`` writes, which have ``reserved_ranks``
    """

    slots: dict[str, int]
    weights: tuple[SteerWeights, ...]
    factors: Factors
    slot_of_direction: torch.Tensor
    bounds: torch.Tensor
    first_reserved: int
    reserved_ranks: int

    @property
    def num_bytes(self) -> int:
        """Device memory of all factors."""
        return sum(weights.num_bytes for weights in self.weights)

    def fill(self, name: str, index: int, factors: Factors) -> None:
        """Put a map into reserved slot ``index``, which no token of a running step uses.

        ``factors`` have as many ranks as the slot; those that the map lacks are zeros.
        """
        slot = self.weights[0].slots[self.first_reserved + index]
        assert isinstance(slot, LowRank)
        for table, rows in zip(self.factors, factors, strict=True):
            table[:, slot.start : slot.end].copy_(rows, non_blocking=True)
        self.slots[name] = self.first_reserved + index

    def remove(self, name: str) -> None:
        """Forget a steer; its slot may be filled again."""
        self.slots.pop(name, None)


def factors_of(steer: LowRankSteer, layers: Sequence[int], ranks: int) -> Factors:
    """A map's factors in ``layers``, with zeros up to ``ranks`` ranks.

    They are float32, as directions are: what a map adds may be a small difference of large
    products.
    """
    shrink, expand = (torch.zeros(len(layers), ranks, steer.hidden_size) for _ in range(2))
    for index, layer in enumerate(layers):
        if layer in steer.layers:
            row = steer.layers.index(layer)
            shrink[index, : steer.rank] = steer.a[row].float()
            expand[index, : steer.rank] = steer.b[row].T.float()
    return Factors(shrink, expand)


def fill_low_rank(
    steers: Mapping[str, LowRankSteer],
    layers: Sequence[int],
    directions: Mapping[str, int],
    *,
    num_directions: int,
    device: torch.device,
    room: MapRoom | None = None,
) -> LowRankTable | None:
    """The maps of one site in ``layers``, and room for others; None if there is neither.

    ``directions`` has the direction of each steer, of ``num_directions`` at the site.
    """
    reserved = 0 if room is None else room.maps
    if not steers and not reserved:
        return None
    parts = [factors_of(steer, layers, steer.rank) for steer in steers.values()]
    slot_of_direction = torch.full((num_directions,), -1, dtype=torch.int32)
    for number, name in enumerate(steers):
        slot_of_direction[directions[name]] = number
    if room is not None:
        zeros = torch.zeros(len(layers), room.ranks, room.width)
        parts += [Factors(zeros, zeros)] * reserved
        first = room.first_direction
        slot_of_direction[first : first + reserved] = torch.arange(
            len(steers), len(parts), dtype=torch.int32
        )
    factors = Factors(
        torch.cat([part.shrink for part in parts], dim=1).to(device),
        torch.cat([part.expand for part in parts], dim=1).to(device),
    )
    slots = _slots([part.shrink.shape[1] for part in parts])
    bounds = [(slot.start, slot.fixed, slot.end) for slot in slots]
    return LowRankTable(
        slots={name: slot for slot, name in enumerate(steers)},
        weights=tuple(_weights(slots, factors, index) for index in range(len(layers))),
        factors=factors,
        slot_of_direction=slot_of_direction.to(device),
        bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
        first_reserved=len(steers),
        reserved_ranks=0 if room is None else room.ranks,
    )


def _slots(ranks: Sequence[int]) -> tuple[LowRank, ...]:
    slots, start = [], 0
    for rank in ranks:
        slots.append(LowRank(start, start + rank, start + rank, epsilon=1.0))
        start += rank
    return tuple(slots)


def _weights(slots: tuple[LowRank, ...], factors: Factors, index: int) -> SteerWeights:
    shrink, expand = factors.shrink[index], factors.expand[index]
    width = shrink.shape[1]
    return SteerWeights(
        slots=slots,
        shrink=shrink,
        expand=expand,
        dense=shrink.new_zeros(0, width, width),
        vectors=shrink.new_zeros(0, width),
    )
