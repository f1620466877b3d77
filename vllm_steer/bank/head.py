"""Device tables of LM-Steers, and the slot of each steer by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_steer.errors import SteerError
from vllm_steer.kernels.lm_steer import Constant, Dense, LowRank, Slot, SteerWeights
from vllm_steer.steers import LMSteer


@dataclass(frozen=True)
class HeadTable:
    """The steers of one width in their packed tables; ``slots`` maps names to table slots."""

    slots: Mapping[str, int]
    weights: SteerWeights

    def epsilon(self, name: str) -> float:
        """A steer's epsilon: the unit of its strength."""
        return self.weights.slots[self.slots[name]].epsilon

    def widest(self, count: int) -> list[str]:
        """The ``count`` steers whose inner activations take the most memory, or all there are."""
        by_width = sorted(
            self.slots, key=lambda name: -_inner_width(self.weights.slots[self.slots[name]])
        )
        return by_width[:count]


@dataclass(frozen=True)
class HeadBank:
    """``hidden`` holds the steers of the head's input (``multiply``, ``add``), ``logits`` those of
    its output (``offset``). A table without a steer is None and costs nothing.
    """

    hidden: HeadTable | None
    logits: HeadTable | None

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        return sum(s.weights.num_bytes for s in (self.hidden, self.logits) if s is not None)


def fill_head_bank(
    steers: Mapping[str, LMSteer], *, dtype: torch.dtype, device: torch.device
) -> HeadBank:
    """Put steers on the device in the model's dtype, in the order of their names.

    Raises ``SteerError`` for a steer with values beyond the dtype's range.
    """
    for name, steer in steers.items():
        _check_range(name, steer, dtype)
    hidden = {n: s for n, s in sorted(steers.items()) if s.variant != "offset"}
    logits = {n: s for n, s in sorted(steers.items()) if s.variant == "offset"}
    return HeadBank(hidden=_table(hidden, dtype, device), logits=_table(logits, dtype, device))


def _check_range(name: str, steer: LMSteer, dtype: torch.dtype) -> None:
    largest = max(float(tensor.float().abs().max()) for tensor in steer.tensors.values())
    if largest > torch.finfo(dtype).max:
        raise SteerError(
            f"steer {name} has values up to {largest:g}, beyond the range of the model's {dtype}; "
            "scale its tensors down and its epsilon up"
        )


def _table(
    steers: Mapping[str, LMSteer], dtype: torch.dtype, device: torch.device
) -> HeadTable | None:
    if not steers:
        return None
    builder = _TableBuilder(dtype, device)
    slots = [builder.add(steer) for steer in steers.values()]
    width = next(iter(steers.values())).width
    weights = SteerWeights(
        slots=tuple(slots),
        shrink=builder.table(builder.shrink, width),
        expand=builder.table(builder.expand, width),
        dense=builder.table(builder.dense, width, width),
        vectors=builder.table(builder.vectors, width),
    )
    return HeadTable({name: slot for slot, name in enumerate(steers)}, weights)


def _inner_width(slot: Slot) -> int:
    return slot.end - slot.start if isinstance(slot, LowRank) else 0


@dataclass
class _TableBuilder:
    """Builds the tables; their parts stay on the host until the tables are complete."""

    dtype: torch.dtype
    device: torch.device
    shrink: list[torch.Tensor] = field(default_factory=list)
    expand: list[torch.Tensor] = field(default_factory=list)
    dense: list[torch.Tensor] = field(default_factory=list)
    vectors: list[torch.Tensor] = field(default_factory=list)
    rank: int = 0

    def add(self, steer: LMSteer) -> Slot:
        """Take a steer in the form that is fewer bytes to read."""
        if steer.variant != "multiply":
            return self._add_constant(steer)
        matrices = 2 if steer.fixed_columns else 1
        if matrices * steer.hidden_size < 2 * steer.total_rank:
            return self._add_dense(steer)
        return self._add_low_rank(steer)

    def _add_low_rank(self, steer: LMSteer) -> LowRank:
        order = [*steer.free_columns, *steer.fixed_columns]
        for table, projector in (
            (self.shrink, steer.projector1),
            (self.expand, steer.projector2),
        ):
            assert projector is not None
            table.append(self._put(projector[order].transpose(1, 2).flatten(0, 1)))
        start, self.rank = self.rank, self.rank + steer.total_rank
        fixed = start + steer.rank * len(steer.free_columns)
        return LowRank(start, fixed, self.rank, steer.epsilon)

    def _add_dense(self, steer: LMSteer) -> Dense:
        assert steer.projector1 is not None and steer.projector2 is not None
        first, second = steer.projector1.float(), steer.projector2.float()

        def put(columns: tuple[int, ...]) -> int:
            product = sum(second[column] @ first[column].T for column in columns)
            self.dense.append(self._put(torch.as_tensor(product)[None]))
            return len(self.dense) - 1

        free = put(steer.free_columns)
        fixed = put(steer.fixed_columns) if steer.fixed_columns else None
        return Dense(free, fixed, steer.epsilon)

    def _add_constant(self, steer: LMSteer) -> Constant:
        (vectors,) = steer.tensors.values()

        def put(columns: tuple[int, ...]) -> int:
            self.vectors.append(self._put(vectors[list(columns)].float().sum(0, keepdim=True)))
            return len(self.vectors) - 1

        free = put(steer.free_columns)
        fixed = put(steer.fixed_columns) if steer.fixed_columns else None
        return Constant(free, fixed, steer.epsilon)

    def table(self, parts: list[torch.Tensor], *shape: int) -> torch.Tensor:
        """One table on the device; empty if no steer has a part in it."""
        whole = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=self.dtype)
        return whole.to(self.device)

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype)
