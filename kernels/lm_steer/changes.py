"""Where the Triton forms put the pairs' changes, and the parts that both have in common."""

from dataclasses import dataclass

import torch
import triton

from vllm_steer.kernels.lm_steer.change_kernels import add_up, constant
from vllm_steer.kernels.lm_steer.operands import SteerTables
from vllm_steer.kernels.lm_steer.placing import PlacedRows

BLOCK_WIDTH = 1024
EXACT = {"enable_fp_fusion": False}  # products and sums round one by one, in every kernel alike


@dataclass(frozen=True, eq=False)
class Target:
    """The result in the making; ``changes [P, width]`` float32 is empty where ``fused``."""

    x: torch.Tensor
    out: torch.Tensor
    changes: torch.Tensor
    fused: bool

    @property
    def width(self) -> int:
        """Columns of ``x``."""
        return self.x.shape[1]


def begin(x: torch.Tensor, placed: PlacedRows) -> Target:
    """Room for the result; rows that no pair touches are copied."""
    if x.data_ptr() % 16:  # kernels are compiled for aligned tensors; a window may begin anywhere
        x = x.clone()
    whole = placed.touched == x.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if whole else _copy(x)
    pairs = 0 if placed.sums is None else placed.rows.shape[0]
    changes = torch.empty(pairs, x.shape[1], dtype=torch.float32, device=x.device)
    return Target(x, out, changes, fused=placed.sums is None)


def finish(target: Target, tables: SteerTables, placed: PlacedRows) -> torch.Tensor:
    """Add the constant slots' changes, then all changes by row; the result."""
    x, out, width = target.x, target.out, target.width
    blocks = triton.cdiv(width, BLOCK_WIDTH)
    if placed.constant is not None:
        constant[(placed.constant.bounds.shape[0], blocks)](
            x,
            tables.vectors,
            placed.rows,
            placed.scales,
            placed.constant.bounds,
            placed.constant.epsilons,
            out,
            target.changes,
            width,
            *x.stride(),
            FUSED=target.fused,
            BLOCK_WIDTH=BLOCK_WIDTH,
            **EXACT,
        )
    if placed.sums is not None:
        add_up[(placed.sums.rows.shape[0], blocks)](
            x,
            target.changes,
            placed.sums.rows,
            placed.sums.starts,
            placed.sums.order,
            out,
            width,
            *x.stride(),
            BLOCK_WIDTH=BLOCK_WIDTH,
            **EXACT,
        )
    return out


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
