"""LM-Steer: the change of a batch's rows of hidden states, under one steer each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from benchmarks.floors import lm_steer_bytes, weight_elements
from benchmarks.operations.lm_steer_forms import FORMS, VARIANTS
from benchmarks.operations.measure import Bench, Tensors, Work, relative_error, sets_for
from vllm_steer.bank import Shelf
from vllm_steer.doses import Dose
from vllm_steer.kernels.lm_steer import Dense, LowRank, Slot, SteeredRows, SteerTables
from vllm_steer.serving.pairs import Uses, steered_rows
from vllm_steer.serving.rows import BatchRows, SteeredRequest


@dataclass(frozen=True)
class LMSteerCase:
    """``rows`` rows take ``distinct`` steers of ``rank`` in turn, each at a strength of its own."""

    width: int
    rank: int
    rows: int
    distinct: int

    @property
    def dense(self) -> bool:
        """Whether the bank keeps the products of the factors, which are smaller."""
        return self.width < 2 * self.rank

    @property
    def columns(self) -> dict[str, Any]:
        """As every case has them; ``case`` tells this grid from others in older results."""
        stored = "dense" if self.dense else "factors"
        return {"section": "lm_steer", "case": "grid", **vars(self), "stored": stored}

    def floor_bytes(self, itemsize: int) -> int:
        """Each steer's weights once, each row in and out."""
        return lm_steer_bytes(**vars(self), itemsize=itemsize)

    @property
    def flops(self) -> int:
        """A product and a sum per row and number of its steer."""
        return 2 * self.rows * weight_elements(self.width, self.rank)

    def sets(self, bench: Bench) -> list["Inputs"]:
        """Sets that take different slots of one bank and different rows."""
        count = sets_for(self.floor_bytes(bench.dtype.itemsize), bench.reach)
        shelf = make_bank(self, count * self.distinct, bench.dtype, bench.device)
        generator = torch.Generator(bench.device).manual_seed(1)
        like = {"dtype": bench.dtype, "device": bench.device, "generator": generator}
        return [
            Inputs(
                self,
                torch.randn(self.rows, self.width, **like),
                shelf.tables,
                batch(self, shelf, nth * self.distinct),
            )
            for nth in range(count)
        ]

    def work(self, form: str, inputs: "Inputs") -> Work:
        """One of ``FORMS``, or a variant beside ours in Triton."""
        work = Work(_tuple((FORMS | VARIANTS)[form](inputs)), partial(_check, inputs))
        if form in VARIANTS:
            return replace(work, beside=_tuple(FORMS["triton_tiles"](inputs)))
        return work


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set: a batch's rows, and which of them take which slot of the tables."""

    case: LMSteerCase
    x: torch.Tensor
    tables: SteerTables
    steered: SteeredRows

    @cached_property
    def exact(self) -> torch.Tensor:
        """The result in float64: ``x[b] + scale * (x[b] P1) P2^T``; see ``kernels/lm_steer``."""
        total = self.x.double()
        for slot, start, end in self.steered.groups:
            rows = torch.from_numpy(self.steered.rows[start:end]).to(self.x.device)
            scales = torch.from_numpy(self.steered.scales[start:end]).to(self.x.device).double()
            scaled = self.x[rows].double() * scales[:, None]
            total.index_add_(0, rows, _change(scaled, self.tables, self.tables.slots[slot]))
        return total


def make_bank(case: LMSteerCase, slots: int, dtype: torch.dtype, device: torch.device) -> Shelf:
    """Random steers, kept as the engine's bank keeps them; a change is about as long as its row."""
    rank, width, dense = case.rank, case.width, case.dense
    generator = torch.Generator(device).manual_seed(0)

    def table(scale: float, *shape: int) -> torch.Tensor:
        made = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return made.mul_(scale)

    kinds: list[Slot] = [
        Dense(slot, None, 1.0)
        if dense
        else LowRank(slot * rank, (slot + 1) * rank, (slot + 1) * rank, 1.0)
        for slot in range(slots)
    ]
    total, scale = 0 if dense else slots * rank, (rank * width) ** -0.25
    tables = SteerTables(
        tuple(kinds),
        shrink=table(scale, total, width),
        expand=table(scale, total, width),
        dense=table(width**-0.5, slots if dense else 0, width, width),
        vectors=table(1.0, 0, width),
    )
    return Shelf({f"s{slot}": slot for slot in range(slots)}, tables)


def batch(case: LMSteerCase, shelf: Shelf, offset: int = 0) -> SteeredRows:
    """The batch as the engine sees it: one request per row."""
    rows = BatchRows([f"r{row}" for row in range(case.rows)], np.ones(case.rows, dtype=np.int64))
    requests = {}
    for row in range(case.rows):
        dose = Dose(f"s{offset + row % case.distinct}", 0.5 + row % 7 / 8)
        requests[f"r{row}"] = SteeredRequest((dose,), 1)
    pairs = steered_rows(rows, Uses(shelf, requests))
    assert pairs is not None
    return pairs


def _tuple(call: Callable[[], torch.Tensor]) -> Callable[[], Tensors]:
    return lambda: (call(),)


def _check(inputs: Inputs, results: Tensors) -> float:
    touched = torch.ones(inputs.case.rows, dtype=torch.bool, device=inputs.x.device)
    return relative_error(results[0], inputs.exact, inputs.x, touched)


def _change(scaled: torch.Tensor, tables: SteerTables, slot: Slot) -> torch.Tensor:
    if isinstance(slot, LowRank):
        ranks = slice(slot.start, slot.end)
        return scaled @ tables.shrink[ranks].double().T @ tables.expand[ranks].double()
    assert isinstance(slot, Dense)
    return scaled @ tables.dense[slot.free].double().T
