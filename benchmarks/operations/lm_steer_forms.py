"""The forms of LM-Steer that are timed: ours, and what else one would call.

Each takes one set of inputs and returns the call to time; what the host prepares once per batch
stays outside of it. Raises ``Skipped`` where a form cannot run the case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.operations.measure import Skipped, ours
from vllm_steer.kernels.dispatch import FEW_ROWS, lm_steer_backend

Call = Callable[[], torch.Tensor]
Inputs = Any  # ``lm_steer.Inputs``


def auto(inputs: Inputs) -> Call:
    """Ours, as an engine of so many rows has it on this device."""
    return engine_form("auto", inputs.case.rows, inputs)


def engine_form(kernels: str, max_rows: int, inputs: Inputs) -> Call:
    """Ours, as an engine of up to ``max_rows`` rows has it."""
    if max_rows <= FEW_ROWS < inputs.case.rows:
        raise Skipped(f"an engine takes programs of one row for up to {FEW_ROWS} rows only")
    return _placed(ours(lm_steer_backend, kernels, inputs.x.device, max_rows=max_rows), inputs)


def gather_bmm(inputs: Inputs) -> Call:
    """Plain torch as one writes it first: each row's own copy of its steer, batched products."""
    case, tables, x = inputs.case, inputs.tables, inputs.x
    _check_room(inputs)
    groups = np.array(inputs.steered.groups)
    slots_of_pairs = np.repeat(groups[:, 0], groups[:, 2] - groups[:, 1])
    order = np.argsort(inputs.steered.rows, kind="stable")
    slots, scales = (
        torch.from_numpy(array[order]).to(x.device)
        for array in (slots_of_pairs, inputs.steered.scales)
    )
    down, up = tables.dense, None
    if not case.dense:
        stacked = (len(tables.slots), case.rank, case.width)
        down, up = tables.shrink.view(stacked), tables.expand.view(stacked)

    def call() -> torch.Tensor:
        inner = torch.bmm(down[slots], x[:, :, None])
        change = inner if up is None else torch.bmm(up[slots].transpose(1, 2), inner)
        return (x + change[:, :, 0] * scales[:, None]).to(x.dtype)

    return call


def addmm(inputs: Inputs) -> Call:
    """One steer for all rows: the two products that nothing in torch does faster."""
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


def varied(options: dict[str, int], inputs: Inputs) -> Call:
    """``triton_tiles`` with some choices of ``tile_sizes`` varied."""
    ours(lm_steer_backend, "triton", inputs.x.device, max_rows=FEW_ROWS + 1)
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
FORMS: dict[str, Callable[[Inputs], Call]] = {
    "triton_tiles": partial(engine_form, "triton", FEW_ROWS + 1),
    "triton_rows": partial(engine_form, "triton", FEW_ROWS),
    "torch_groups": partial(engine_form, "torch", FEW_ROWS + 1),
    "gather_bmm": gather_bmm,
    "addmm": addmm,
}


def _placed(form: Any, inputs: Inputs) -> Call:
    metadata = form.prepare(inputs.steered, inputs.tables, inputs.x.device)
    return lambda: form.steer_rows(inputs.x, inputs.tables, metadata)


def _check_room(inputs: Inputs) -> None:
    """The copies may take a quarter of a card's free memory, or 16 MiB elsewhere."""
    case = inputs.case
    per_row = case.width * (case.width if case.dense else case.rank) * inputs.x.element_size()
    needed, room = case.rows * per_row, 2**24
    if inputs.x.device.type == "cuda":
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info(inputs.x.device)[0] // 4
    if needed > room:
        raise Skipped(f"a copy per row takes {needed >> 20} MiB, room is {room >> 20} MiB")
