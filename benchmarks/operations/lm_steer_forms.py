"""The forms of LM-Steer that are timed: ours, and what else one would call.

Each takes one set of inputs and returns the call to time; what the host prepares once per batch
stays outside of it. Raises ``Skipped`` where a form cannot run the case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from operations.lm_steer_inputs import Inputs
from operations.measure import Skipped
from operations.vllm_lora import vllm_lora
from vllm_steer.kernels.dispatch import FEW_ROWS, KernelError, lm_steer_form

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How a form is made ready.

    even        it knows one strength for all rows only, and is given and checked with that
    repeatable  the same inputs give the same bits
    beside      a form to compare its bits with: the line then has ``same_bits``
    """

    prepare: Callable[[Inputs], Call]
    even: bool = False
    repeatable: bool = True
    beside: Callable[[Inputs], Call] | None = None

    def inputs(self, given: Inputs) -> Inputs:
        """The set as this form takes it."""
        if not self.even:
            return given
        ones = np.ones_like(given.steered.scales)
        return replace(given, steered=replace(given.steered, scales=ones))


def torch_groups(inputs: Inputs) -> Call:
    """Ours in plain torch."""
    return _ours(inputs, "torch", max_rows=FEW_ROWS + 1)


def triton_tiles(inputs: Inputs) -> Call:
    """Ours in Triton as an engine of many rows has it."""
    return _ours(inputs, "triton", max_rows=FEW_ROWS + 1)


def triton_rows(inputs: Inputs) -> Call:
    """Ours in Triton as an engine of few rows has it."""
    if inputs.case.rows > FEW_ROWS:
        raise Skipped(f"an engine takes programs of one row for up to {FEW_ROWS} rows only")
    return _ours(inputs, "triton", max_rows=FEW_ROWS)


def gather_bmm(inputs: Inputs) -> Call:
    """Plain torch as one writes it first: each pair's own copy of its steer, batched products."""
    case, tables, x = inputs.case, inputs.tables, inputs.x
    if len(set(case.ranks)) > 1:
        raise Skipped("ranks differ: factors of one bank do not stack")
    order = np.argsort(inputs.steered.rows, kind="stable")
    pairs = [torch.from_numpy(array[order]).to(x.device) for array in _pairs(inputs)]
    rows, slots, scales = pairs[0], pairs[1], pairs[2][:, None, None]
    _check_room(inputs, len(order))
    touched, steers = rows[:: case.per_row], case.per_row
    down, up = tables.dense, None
    if not case.dense:
        stacked = (len(tables.slots), case.ranks[0], case.width)
        down, up = tables.shrink.view(stacked), tables.expand.view(stacked)

    def call() -> torch.Tensor:
        inner = torch.bmm(down[slots], x[rows][:, :, None])
        change = inner if up is None else torch.bmm(up[slots].transpose(1, 2), inner)
        sums = (change * scales).view(-1, steers, x.shape[1]).sum(1)
        return x.index_copy(0, touched, (x[touched] + sums).to(x.dtype))

    return call


def addmm(inputs: Inputs) -> Call:
    """One steer for all rows: the two products that nothing in torch does faster."""
    case, tables, x = inputs.case, inputs.tables, inputs.x
    if case.distinct > 1 or case.share < 1:
        raise Skipped("one product takes one steer for all rows")
    slot = inputs.steered.groups[0][0]
    scales = torch.from_numpy(inputs.steered.scales).to(x.device, x.dtype)[:, None]
    if case.dense:
        matrix = tables.dense[slot].T
        return lambda: torch.addmm(x, x * scales, matrix)
    ranks = slice(slot * case.ranks[0], (slot + 1) * case.ranks[0])
    down, up = tables.shrink[ranks].T, tables.expand[ranks]
    return lambda: torch.addmm(x, (x @ down).mul_(scales), up)


def varied(options: dict[str, int]) -> Form:
    """``triton_tiles`` with some choices of ``tile_sizes`` varied."""

    def prepare(inputs: Inputs) -> Call:
        if inputs.device.type != "cuda":
            raise Skipped(no_triton(inputs.device))
        from vllm_steer.kernels.lm_steer.by_tile import BY_TILE, tiled

        form = tiled(**options)
        if form.sizes(inputs.tables) == BY_TILE.sizes(inputs.tables):
            raise Skipped("the same blocks as an engine takes, for this bank")
        placed = form.place(inputs.steered, inputs.tables, inputs.device)
        return lambda: form.steer_rows(inputs.x, inputs.tables, placed)

    return Form(prepare, beside=triton_tiles)


VARIED: dict[str, dict[str, int]] = {
    "rows16": {"rows": 16},
    "rows64": {"rows": 64},
    "columns32": {"columns": 32},
    "columns16": {"columns": 16},
    "chunks4": {"few_chunks": 4},
    "fold_apart": {"few_chunks": 0},
}
"""What arithmetic alone does not settle: rows of a tile, columns of a program, and who folds."""

VARIANTS: dict[str, Form] = {f"tiles_{name}": varied(VARIED[name]) for name in VARIED}
FORMS: dict[str, Form] = {
    "triton_tiles": Form(triton_tiles),
    "triton_rows": Form(triton_rows),
    "torch_groups": Form(torch_groups),
    "gather_bmm": Form(gather_bmm),
    "addmm": Form(addmm),
    "vllm_lora": Form(vllm_lora, even=True, repeatable=False),
}


def _ours(inputs: Inputs, kernels: str, *, max_rows: int) -> Call:
    if kernels == "triton" and inputs.device.type != "cuda":
        raise Skipped(no_triton(inputs.device))
    try:
        form = lm_steer_form(kernels, inputs.device, max_rows=max_rows)
    except KernelError as error:
        raise Skipped(str(error)) from None
    placed = form.place(inputs.steered, inputs.tables, inputs.device)
    return lambda: form.steer_rows(inputs.x, inputs.tables, placed)


def no_triton(device: torch.device) -> str:
    """Why Triton is not timed on a device other than CUDA."""
    return f"the device is {device.type}: an interpreter's time is no kernel's time"


def _pairs(inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, slot and scale of every pair."""
    slots, starts, ends = np.array(inputs.steered.groups).T
    return inputs.steered.rows, np.repeat(slots, ends - starts), inputs.steered.scales


def _check_room(inputs: Inputs, pairs: int) -> None:
    """The copies may take a quarter of a card's free memory, or 16 MiB elsewhere."""
    case = inputs.case
    per_pair = case.width * (case.width if case.dense else case.ranks[0]) * inputs.x.element_size()
    needed, room = pairs * per_pair, 2**24
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info(inputs.device)[0] // 4
    if needed > room:
        raise Skipped(f"a copy per row takes {needed >> 20} MiB, room is {room >> 20} MiB")
