"""The forms of LM-Steer that are timed: ours, and what else one would call.

Each takes one set of inputs and returns the call to time; what the host prepares once per batch
stays outside of it. Raises ``Skipped`` where a form cannot run the case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.operations.measure import Skipped, ours
from vllm_steer.kernels.dispatch import FEW_ROWS, lm_steer_backend

Call = Callable[[], torch.Tensor]
Inputs = Any  # ``lm_steer.Inputs``


def engine_form(kernels: str, max_rows: int | None, inputs: Inputs) -> Call:
    """Ours, as an engine of up to ``max_rows`` rows has it; None: of as many as the batch has."""
    max_rows = max_rows or inputs.case.rows
    if max_rows <= FEW_ROWS < inputs.case.rows:
        raise Skipped(f"an engine takes programs of one row for up to {FEW_ROWS} rows only")
    return _placed(ours(lm_steer_backend, kernels, inputs.x.device, max_rows=max_rows), inputs)


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
    "addmm": addmm,
}


def _placed(form: Any, inputs: Inputs) -> Call:
    metadata = form.prepare(inputs.steered, inputs.tables, inputs.x.device)
    return lambda: form.steer_rows(inputs.x, inputs.tables, metadata)
