"""Device tables of low-rank maps: per site, the packed factors of its steers in each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer import LowRank, SteerWeights
from vllm_steer.steers import LowRankSteer


@dataclass(frozen=True)
class LowRankTable:
    """The low-rank maps of one site, in the operands of LM-Steer: ``x A^T`` and ``B^T``.

    slots    from names to slots, the same in every layer
    weights  per layer of the site's table, with zeros where a steer does not act
    slot_of_direction   ``[D]`` int32, the slot of the steer that a direction belongs to; -1: none
    bounds   ``[S, 3]`` int32, each slot's start, fixed and end
    """

    slots: Mapping[str, int]
    weights: tuple[SteerWeights, ...]
    slot_of_direction: torch.Tensor
    bounds: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of all factors."""
        return sum(weights.num_bytes for weights in self.weights)


def fill_low_rank(
    steers: Mapping[str, LowRankSteer],
    layers: Sequence[int],
    directions: Mapping[str, int],
    *,
    num_directions: int,
    device: torch.device,
) -> LowRankTable | None:
    """The maps of one site in ``layers``; None if there are none.

    ``directions`` has the direction of each steer, of ``num_directions`` at the site. Factors are
    float32, as directions are: what a map adds may be a small difference of large products.
    """
    if not steers:
        return None
    slots, start = [], 0
    for steer in steers.values():
        slots.append(LowRank(start, start + steer.rank, start + steer.rank, epsilon=1.0))
        start += steer.rank
    width = next(iter(steers.values())).hidden_size
    weights = []
    for layer in layers:
        shrink, expand = (torch.zeros(start, width) for _ in range(2))
        for slot, steer in zip(slots, steers.values(), strict=True):
            if layer in steer.layers:
                row = steer.layers.index(layer)
                shrink[slot.start : slot.end] = steer.a[row].float()
                expand[slot.start : slot.end] = steer.b[row].T.float()
        weights.append(
            SteerWeights(
                slots=tuple(slots),
                shrink=shrink.to(device),
                expand=expand.to(device),
                dense=shrink.new_zeros(0, width, width).to(device),
                vectors=shrink.new_zeros(0, width).to(device),
            )
        )
    slot_of_direction = torch.full((num_directions,), -1, dtype=torch.int32)
    for number, name in enumerate(steers):
        slot_of_direction[directions[name]] = number
    bounds = [(slot.start, slot.fixed, slot.end) for slot in slots]
    return LowRankTable(
        slots={name: slot for slot, name in enumerate(steers)},
        weights=tuple(weights),
        slot_of_direction=slot_of_direction.to(device),
        bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
    )
