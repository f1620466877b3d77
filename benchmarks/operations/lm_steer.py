"""LM-Steer: the change of a batch's rows of hidden states, with one steer each.

A form takes one set of inputs and returns the call to time; the preparation on the host, once per
batch, is not timed. It raises ``Skipped`` where it cannot run the case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from benchmarks.dummy_model import lm_steer_bytes, weight_elements
from benchmarks.operations.measure import (
    MeasurementSetup,
    Operation,
    OperationCase,
    Skipped,
    Tensors,
    dispatched,
    relative_error,
    sets_for,
)
from vllm_steer.bank import HeadTable
from vllm_steer.doses import Dose
from vllm_steer.kernels.dispatch import FEW_ROWS, lm_steer_backend
from vllm_steer.kernels.lm_steer import Dense, LowRank, Slot, SteeredRows, SteerWeights
from vllm_steer.serving.row_slots import RequestSlots, steered_rows
from vllm_steer.serving.step import BatchRows, SteeredRequest

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class LMSteerCase(OperationCase):
    """``rows`` rows take ``distinct`` steers of ``rank`` round-robin, each at its own strength."""

    width: int
    rank: int
    rows: int
    distinct: int
    section = "lm_steer"
    case = "grid"  # older results have other sizes

    @property
    def dense(self) -> bool:
        """True if the bank stores the products of the factors, because they are smaller."""
        return self.width < 2 * self.rank

    @property
    def flops(self) -> int:
        """One multiplication and one addition per row and weight of its steer."""
        return 2 * self.rows * weight_elements(self.width, self.rank)

    def floor_bytes(self, itemsize: int) -> int:
        """Bytes of each steer's weights once, and each row in and out."""
        return lm_steer_bytes(**vars(self), itemsize=itemsize)

    def sets(self, bench: MeasurementSetup) -> list["LMSteerInputs"]:
        """Sets with different slots of one bank and different rows."""
        count = sets_for(self.floor_bytes(bench.dtype.itemsize), bench.reach)
        table = make_bank(self, count * self.distinct, bench.dtype, bench.device)
        generator = torch.Generator(bench.device).manual_seed(1)
        like = {"dtype": bench.dtype, "device": bench.device, "generator": generator}
        sets = []
        for nth in range(count):
            x, steered = torch.randn(self.rows, self.width, **like), batch(self, table, nth)
            sets.append(LMSteerInputs(self, x, table.weights, steered))
        return sets

    def work(self, form: str, inputs: "LMSteerInputs") -> Operation:
        """One of ``FORMS``, a variant of dispatched in Triton, or ``auto``."""
        call = (FORMS | VARIANTS | {"auto": partial(engine_form, "auto", None)})[form](inputs)
        touched = torch.ones(self.rows, dtype=torch.bool, device=inputs.x.device)

        def check(results: Tensors) -> float:
            return relative_error(results[0], inputs.exact, inputs.x, touched)

        return Operation(lambda: (call(),), check)


@dataclass(frozen=True, eq=False)
class LMSteerInputs:
    """One set of inputs: a batch's rows, and the slots that they use."""

    case: LMSteerCase
    x: torch.Tensor
    tables: SteerWeights
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


def make_bank(case: LMSteerCase, slots: int, dtype: torch.dtype, device: torch.device) -> HeadTable:
    """A bank of random steers, as in an engine; a change is about as long as its row."""
    rank, width, dense = case.rank, case.width, case.dense
    generator = torch.Generator(device).manual_seed(0)

    def table(scale: float, *shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return tensor.mul_(scale)

    kinds: list[Slot] = [
        Dense(slot, None, 1.0)
        if dense
        else LowRank(slot * rank, (slot + 1) * rank, (slot + 1) * rank, 1.0)
        for slot in range(slots)
    ]
    total, scale = 0 if dense else slots * rank, (rank * width) ** -0.25
    tables = SteerWeights(
        tuple(kinds),
        shrink=table(scale, total, width),
        expand=table(scale, total, width),
        dense=table(width**-0.5, slots if dense else 0, width, width),
        vectors=table(1.0, 0, width),
    )
    return HeadTable({f"s{slot}": slot for slot in range(slots)}, tables)


def batch(case: LMSteerCase, table: HeadTable, nth: int) -> SteeredRows:
    """The batch of the ``nth`` set, as in an engine: one request per row."""
    rows = BatchRows([f"r{row}" for row in range(case.rows)], np.ones(case.rows, dtype=np.int64))
    requests = {}
    for row in range(case.rows):
        dose = Dose(f"s{nth * case.distinct + row % case.distinct}", 0.5 + row % 7 / 8)
        requests[f"r{row}"] = SteeredRequest((dose,), 1)
    pairs = steered_rows(rows, RequestSlots(table, requests))
    assert pairs is not None
    return pairs


def _change(scaled: torch.Tensor, tables: SteerWeights, slot: Slot) -> torch.Tensor:
    if isinstance(slot, LowRank):
        ranks = slice(slot.start, slot.end)
        return scaled @ tables.shrink[ranks].double().T @ tables.expand[ranks].double()
    assert isinstance(slot, Dense)
    return scaled @ tables.dense[slot.free].double().T


def engine_form(kernels: str, max_rows: int | None, inputs: LMSteerInputs) -> Call:
    """The operation of vllm-steer in an engine with up to ``max_rows`` rows; None: the rows of the
    batch.
    """
    max_rows = max_rows or inputs.case.rows
    if max_rows <= FEW_ROWS < inputs.case.rows:
        raise Skipped(f"an engine takes programs of one row for up to {FEW_ROWS} rows only")
    return _placed(
        dispatched(lm_steer_backend, kernels, inputs.x.device, max_rows=max_rows), inputs
    )


def addmm(inputs: LMSteerInputs) -> Call:
    """One steer for all rows: two products, the fastest way in torch."""
    case, tables, x = inputs.case, inputs.tables, inputs.x
    if case.distinct > 1:
        raise Skipped("one product takes one steer for all rows")
    slot = inputs.steered.groups[0][0]
    scales = torch.from_numpy(inputs.steered.scales).to(x.device, x.dtype)[:, None]
    if case.dense:
        matrix = tables.dense[slot].T
        return lambda: torch.addmm(x, x * scales, matrix)
    ranks = slice(slot * case.rank, (slot + 1) * case.rank)
    down, up = tables.shrink[ranks].T, tables.expand[ranks]
    return lambda: torch.addmm(x, (x @ down).mul_(scales), up)


def varied(options: dict[str, int], inputs: LMSteerInputs) -> Call:
    """``triton_tiles`` with some choices of ``tile_sizes`` varied."""
    dispatched(lm_steer_backend, "triton", inputs.x.device, max_rows=FEW_ROWS + 1)
    from vllm_steer.kernels.lm_steer.triton_tiled import TILED, tiled

    form = tiled(**options)
    if form.sizes(inputs.tables) == TILED.sizes(inputs.tables):
        raise Skipped("the same blocks as an engine takes, for this bank")
    return _placed(form, inputs)


VARIED: dict[str, dict[str, int]] = {
    "rows16": {"rows": 16},
    "rows64": {"rows": 64},
    "columns32": {"columns": 32},
    "columns16": {"columns": 16},
    "chunks4": {"few_chunks": 4},
    "fold_apart": {"few_chunks": 0},
}
"""What arithmetic alone does not settle: rows of a tile, columns of a program, and who folds."""

VARIANTS = {f"tiles_{name}": partial(varied, options) for name, options in VARIED.items()}
FORMS: dict[str, Callable[[LMSteerInputs], Call]] = {
    "triton_tiles": partial(engine_form, "triton", FEW_ROWS + 1),
    "triton_rows": partial(engine_form, "triton", FEW_ROWS),
    "torch_groups": partial(engine_form, "torch", FEW_ROWS + 1),
    "addmm": addmm,
}


def _placed(form: Any, inputs: LMSteerInputs) -> Call:
    metadata = form.prepare(inputs.steered, inputs.tables, inputs.x.device)
    return lambda: form.steer_rows(inputs.x, inputs.tables, metadata)
