"""Device tables of LM-Steers, and the slot of each steer by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from vllm_steer.errors import SteerError
from vllm_steer.kernels.lm_steer import Constant, Dense, LowRank, Slot, SteerWeights
from vllm_steer.steers import LMSteer


@dataclass(frozen=True)
class HeadRoom:
    """Reserved slots for steers that are loaded later: ``hidden`` ones of up to ``max_rank`` ranks
    over all columns for the head's input, of ``hidden_size``; ``logits`` ones of ``vocab_size``.
    """

    hidden: int
    logits: int
    max_rank: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class SlotTensors:
    """What a reserved slot is filled with, in host memory in the model's dtype.

    factors  ``[ranks, width]`` twice, of ``multiply``: free columns first, ``num_free`` ranks
    vectors  ``[1 or 2, width]``, of the other variants: the free sum, then the fixed one
    """

    epsilon: float
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    num_free: int = 0
    vectors: torch.Tensor | None = None

    def pinned(self, is_pinned: bool) -> "SlotTensors":
        """The same in pinned memory, from which a GPU copies beside other work."""
        if not is_pinned:
            return self
        if self.factors is not None:
            first, second = self.factors
            return replace(self, factors=(first.pin_memory(), second.pin_memory()))
        assert self.vectors is not None
        return replace(self, vectors=self.vectors.pin_memory())


@dataclass
class HeadTable:
    """The steers of one width in their packed tables; ``slots`` maps names to table slots.

    The tensors keep their addresses; a reserved slot is filled by ``fill``. Reserved slots begin at
    ``first_reserved``; slot ``first_reserved + i`` has ``reserved_ranks`` ranks from row
    ``first_rank + i * reserved_ranks`` on, and two vectors from ``first_vector + 2 * i`` on.
    """

    slots: dict[str, int]
    weights: SteerWeights
    first_reserved: int = 0
    reserved_ranks: int = 0
    first_rank: int = 0
    first_vector: int = 0

    def fill(self, name: str, index: int, tensors: SlotTensors) -> None:
        """Fill the reserved slot ``index``, which no row of a running step uses."""
        weights = self.weights
        if tensors.factors is not None:
            shrink, expand = tensors.factors
            start = self.first_rank + index * self.reserved_ranks
            end = start + shrink.shape[0]
            weights.shrink[start:end].copy_(shrink, non_blocking=True)
            weights.expand[start:end].copy_(expand, non_blocking=True)
            slot: Slot = LowRank(start, start + tensors.num_free, end, tensors.epsilon)
        else:
            assert tensors.vectors is not None
            free, count = self.first_vector + 2 * index, tensors.vectors.shape[0]
            weights.vectors[free : free + count].copy_(tensors.vectors, non_blocking=True)
            slot = Constant(free, free + 1 if count == 2 else None, tensors.epsilon)
        slots = list(weights.slots)
        slots[self.first_reserved + index] = slot
        self.weights = replace(weights, slots=tuple(slots))
        self.slots[name] = self.first_reserved + index

    def remove(self, name: str) -> None:
        """Forget a steer; its slot may be filled again."""
        self.slots.pop(name, None)

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
    steers: Mapping[str, LMSteer],
    *,
    dtype: torch.dtype,
    device: torch.device,
    room: HeadRoom | None = None,
) -> HeadBank:
    """Put steers on the device in the model's dtype, in the order of their names, and reserve room.

    Raises ``SteerError`` for a steer with values beyond the dtype's range.
    """
    for name, steer in steers.items():
        check_range(name, steer, dtype)
    hidden = {n: s for n, s in sorted(steers.items()) if s.variant != "offset"}
    logits = {n: s for n, s in sorted(steers.items()) if s.variant == "offset"}
    if room is None:
        return HeadBank(hidden=_table(hidden, dtype, device), logits=_table(logits, dtype, device))
    return HeadBank(
        hidden=_table(
            hidden, dtype, device, room.hidden, ranks=room.max_rank, width=room.hidden_size
        ),
        logits=_table(logits, dtype, device, room.logits, width=room.vocab_size),
    )


def slot_tensors(steer: LMSteer, dtype: torch.dtype) -> SlotTensors:
    """What the reserved slot of a steer is filled with."""
    if steer.variant != "multiply":
        rows = [_vector_sum(steer, steer.free_columns)]
        if steer.fixed_columns:
            rows.append(_vector_sum(steer, steer.fixed_columns))
        return SlotTensors(steer.epsilon, vectors=torch.cat(rows).to(dtype))
    first, second = (factor.to(dtype).contiguous() for factor in _factors(steer))
    num_free = steer.rank * len(steer.free_columns)
    return SlotTensors(steer.epsilon, (first, second), num_free)


def check_range(name: str, steer: LMSteer, dtype: torch.dtype) -> None:
    """Raise ``SteerError`` for a steer with values beyond the dtype's range."""
    largest = max(float(tensor.float().abs().max()) for tensor in steer.tensors.values())
    if largest > torch.finfo(dtype).max:
        raise SteerError(
            f"steer {name} has values up to {largest:g}, beyond the range of the model's {dtype}; "
            "scale its tensors down and its epsilon up"
        )


def _table(
    steers: Mapping[str, LMSteer],
    dtype: torch.dtype,
    device: torch.device,
    reserved: int = 0,
    *,
    ranks: int = 0,
    width: int = 0,
) -> HeadTable | None:
    if not steers and not reserved:
        return None
    builder = _TableBuilder(dtype, device)
    slots = [builder.add(steer) for steer in steers.values()]
    names = {name: slot for slot, name in enumerate(steers)}
    width = next(iter(steers.values())).width if steers else width
    first_rank, first_vector = builder.rank, len(builder.vectors)
    builder.reserve(reserved, ranks, width)
    for index in range(reserved if ranks else 0):
        start = first_rank + index * ranks
        names[_reserved_name(index)] = len(slots)
        slots.append(LowRank(start, start + ranks, start + ranks, 1.0))
    if reserved and not ranks:
        names[_reserved_name(0)] = len(slots)
        slots += [Constant(first_vector + 2 * index, None, 1.0) for index in range(reserved)]
    elif reserved:  # so that the kernel of vectors is compiled at start-up, too
        slots.append(Constant(first_vector, None, 1.0))
    weights = SteerWeights(
        slots=tuple(slots),
        shrink=builder.table(builder.shrink, width),
        expand=builder.table(builder.expand, width),
        dense=builder.table(builder.dense, width, width),
        vectors=builder.table(builder.vectors, width),
        reserved_ranks=ranks,
    )
    return HeadTable(names, weights, len(steers), ranks, first_rank, first_vector)


def _reserved_name(index: int) -> str:
    """A name that no steer can have; the memory profile finds the widest slots by their names."""
    return f"<reserved {index}>"


def _factors(steer: LMSteer) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projectors as ``[ranks, width]``: free columns first."""
    order = [*steer.free_columns, *steer.fixed_columns]
    assert steer.projector1 is not None and steer.projector2 is not None
    first, second = (
        projector[order].transpose(1, 2).flatten(0, 1)
        for projector in (steer.projector1, steer.projector2)
    )
    return first, second


def _vector_sum(steer: LMSteer, columns: tuple[int, ...]) -> torch.Tensor:
    """``[1, width]``: the sum of some columns."""
    (vectors,) = steer.tensors.values()
    return vectors[list(columns)].float().sum(0, keepdim=True)


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
        for table, factor in zip((self.shrink, self.expand), _factors(steer), strict=True):
            table.append(self._put(factor))
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
        def put(columns: tuple[int, ...]) -> int:
            self.vectors.append(self._put(_vector_sum(steer, columns)))
            return len(self.vectors) - 1

        free = put(steer.free_columns)
        fixed = put(steer.fixed_columns) if steer.fixed_columns else None
        return Constant(free, fixed, steer.epsilon)

    def reserve(self, count: int, ranks: int, width: int) -> None:
        """Zeros for ``count`` slots: of ``ranks`` ranks, and of two vectors."""
        if not count:
            return
        if ranks:
            zeros = torch.zeros(count * ranks, width, dtype=self.dtype)
            self.shrink.append(zeros)
            self.expand.append(zeros)
        self.vectors += [torch.zeros(1, width, dtype=self.dtype)] * (2 * count)

    def table(self, parts: list[torch.Tensor], *shape: int) -> torch.Tensor:
        """One table on the device; empty if no steer has a part in it."""
        whole = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=self.dtype)
        return whole.to(self.device)

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype)
