"""Random banks and batches for the cases of LM-Steer, and their results in float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from operations.lm_steer_cases import LMSteerCase
from operations.measure import Bench, sets_for
from vllm_steer.bank import Shelf
from vllm_steer.doses import Dose
from vllm_steer.kernels.lm_steer import Dense, LowRank, Slot, SteeredRows, SteerTables
from vllm_steer.serving.pairs import Uses, steered_rows
from vllm_steer.serving.rows import BatchRows, SteeredRequest


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set: a batch's rows, and which of them take which slot of the shelf."""

    case: LMSteerCase
    shelf: Shelf
    x: torch.Tensor
    steered: SteeredRows

    @property
    def tables(self) -> SteerTables:
        """The bank's tables."""
        return self.shelf.tables

    @property
    def device(self) -> torch.device:
        """Where it all is."""
        return self.x.device


def make_bank(
    width: int, ranks: tuple[int, ...], slots: int, dtype: torch.dtype, device: torch.device
) -> Shelf:
    """``slots`` random steers with ``ranks`` in turn, kept as the engine's bank keeps them.

    Entries are scaled so that a change is about as long as its row.
    """
    of_slot = [ranks[slot % len(ranks)] for slot in range(slots)]
    ends = np.cumsum(of_slot).tolist()
    dense = width < 2 * min(ranks)
    kinds: list[Slot] = [
        Dense(slot, None, 1.0) if dense else LowRank(end - rank, end, end, 1.0)
        for slot, (end, rank) in enumerate(zip(ends, of_slot, strict=True))
    ]
    generator = torch.Generator(device).manual_seed(0)

    def table(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    scales = torch.tensor([(rank * width) ** -0.25 for rank in of_slot], device=device, dtype=dtype)
    per_rank = scales.repeat_interleave(torch.tensor(of_slot, device=device))[:, None]
    total = 0 if dense else ends[-1]
    tables = SteerTables(
        tuple(kinds),
        shrink=table(total, width).mul_(per_rank[:total]),
        expand=table(total, width).mul_(per_rank[:total]),
        dense=table(slots if dense else 0, width, width).mul_(width**-0.5),
        vectors=table(0, width),
    )
    return Shelf({f"s{slot}": slot for slot in range(slots)}, tables)


def slots_for(cases: list[LMSteerCase], itemsize: int, reach: int) -> int:
    """Steers in the bank: all that a case takes, and enough to rotate beyond the cache."""
    most = max(cases, key=lambda case: case.distinct)
    weights = most.floor_bytes(itemsize) / most.distinct
    wanted = min(256, -(-reach // int(weights)))
    return -(-max(wanted, most.distinct) // most.distinct) * most.distinct


def input_sets(case: LMSteerCase, shelf: Shelf, bench: Bench) -> Iterator[Inputs]:
    """Sets that take different slots and rows, together beyond the cache."""
    room = len(shelf.slots) // case.distinct
    count = sets_for(case.floor_bytes(bench.dtype.itemsize), bench.reach, most=room)
    generator = torch.Generator(bench.device).manual_seed(1)
    like = {"dtype": bench.dtype, "device": bench.device, "generator": generator}
    for nth in range(count):
        x = torch.randn(case.rows, case.width, **like)
        rows, requests = batch(case, nth * case.distinct)
        pairs = steered_rows(rows, Uses(shelf, requests))
        assert pairs is not None
        yield Inputs(case, shelf, x, pairs)


def batch(case: LMSteerCase, offset: int = 0) -> tuple[BatchRows, dict[str, SteeredRequest]]:
    """The batch as the engine holds it: one request per row, each at strengths of its own."""
    rows = BatchRows([f"r{row}" for row in range(case.rows)], np.ones(case.rows, dtype=np.int64))
    requests = {
        f"r{row}": SteeredRequest(
            tuple(Dose(f"s{offset + steer}", 0.5 + (row + steer) % 7 / 8) for steer in steers), 1
        )
        for row, steers in enumerate(case.steers)
        if steers
    }
    return rows, requests


def exact(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """The result in float64: ``x[b] + sum scale * (x[b] P1) P2^T``; see ``kernels/lm_steer``."""
    total = x.double()
    for slot, start, end in steered.groups:
        rows = torch.from_numpy(steered.rows[start:end]).to(x.device)
        scales = torch.from_numpy(steered.scales[start:end]).to(x.device).double()
        scaled = x[rows].double() * scales[:, None]
        total.index_add_(0, rows, _change(scaled, tables, tables.slots[slot]))
    return total


def _change(scaled: torch.Tensor, tables: SteerTables, slot: Slot) -> torch.Tensor:
    if isinstance(slot, LowRank):
        ranks = slice(slot.start, slot.end)
        return scaled @ tables.shrink[ranks].double().T @ tables.expand[ranks].double()
    assert isinstance(slot, Dense)
    return scaled @ tables.dense[slot.free].double().T
