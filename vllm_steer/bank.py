"""The bank: the device tables that hold loaded steers, and the slot of each by name."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer import SteerTables
from vllm_steer.steer import LMSteer, Steer


@dataclass(frozen=True)
class Shelf:
    """The steers of one width in their packed tables; ``slots`` maps names to table slots."""

    slots: Mapping[str, int]
    tables: SteerTables

    @property
    def widest(self) -> str:
        """The steer with the largest rank."""
        bounds = self.tables.bounds
        return max(
            self.slots, key=lambda name: bounds[self.slots[name] + 1] - bounds[self.slots[name]]
        )


@dataclass(frozen=True)
class Bank:
    """``hidden`` holds the steers of the head's input (``multiply``, ``add``), ``logits`` those of
    its output (``offset``). A shelf without a steer is None and costs nothing.
    """

    hidden: Shelf | None
    logits: Shelf | None

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        return sum(s.tables.num_bytes for s in (self.hidden, self.logits) if s is not None)


def fill_bank(steers: Mapping[str, Steer], *, dtype: torch.dtype, device: torch.device) -> Bank:
    """Put steers on the device in the model's dtype, in the order of their names."""
    hidden = {n: s for n, s in sorted(steers.items()) if s.variant != "offset"}
    logits = {n: s for n, s in sorted(steers.items()) if s.variant == "offset"}
    return Bank(hidden=_shelf(hidden, dtype, device), logits=_shelf(logits, dtype, device))


def _shelf(steers: Mapping[str, LMSteer], dtype: torch.dtype, device: torch.device) -> Shelf | None:
    if not steers:
        return None
    blocks = [_block(steer) for steer in steers.values()]
    bounds = [0]
    for _, expand, _ in blocks:
        bounds.append(bounds[-1] + expand.shape[0])
    width = blocks[0][1].shape[1]
    shrink = torch.zeros(bounds[-1], width, dtype=dtype, device=device)
    expand = torch.empty(bounds[-1], width, dtype=dtype, device=device)
    for start, end, (block_shrink, block_expand, _) in zip(
        bounds, bounds[1:], blocks, strict=False
    ):
        expand[start:end] = block_expand
        if block_shrink is not None:
            shrink[start:end] = block_shrink
    if all(block_shrink is None for block_shrink, _, _ in blocks):
        shrink = shrink[:0]
    return Shelf(
        slots={name: slot for slot, name in enumerate(steers)},
        tables=SteerTables(
            shrink=shrink,
            expand=expand,
            bounds=tuple(bounds),
            free_ranks=tuple(free for _, _, free in blocks),
            multiplies=tuple(steer.variant == "multiply" for steer in steers.values()),
            epsilons=tuple(steer.epsilon for steer in steers.values()),
        ),
    )


def _block(steer: LMSteer) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """A steer's ``(shrink, expand, free rank)``: free columns first, then the fixed ones."""
    order = [*steer.free_columns, *steer.fixed_columns]
    if steer.projector1 is not None and steer.projector2 is not None:
        shrink, expand = (
            p[order].transpose(1, 2).reshape(-1, steer.hidden_size).float()
            for p in (steer.projector1, steer.projector2)
        )
        return shrink, expand, steer.rank * len(steer.free_columns)
    (vectors,) = steer.tensors.values()
    free = vectors[list(steer.free_columns)].float().sum(0, keepdim=True)
    fixed = vectors[list(steer.fixed_columns)].float().sum(0, keepdim=True)
    return None, torch.cat([free, fixed]) if steer.fixed_columns else free, 1
