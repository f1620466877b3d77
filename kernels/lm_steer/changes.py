"""The result buffers of the Triton backends, and the sum of the changes per row."""

from dataclasses import dataclass

import torch
import triton

from vllm_steer.kernels.lm_steer.change_kernels import add_up, constant
from vllm_steer.kernels.lm_steer.metadata import BatchMetadata
from vllm_steer.kernels.lm_steer.operands import SteerWeights

BLOCK_WIDTH = 1024
EXACT = {"enable_fp_fusion": False}  # products and sums round one by one, in every kernel alike


@dataclass(frozen=True, eq=False)
class ResultBuffers:
    """The result; ``changes [P, width]`` float32 is empty if ``fused``."""

    x: torch.Tensor
    out: torch.Tensor
    changes: torch.Tensor
    fused: bool

    @property
    def width(self) -> int:
        """Columns of ``x``."""
        return self.x.shape[1]


def allocate(x: torch.Tensor, metadata: BatchMetadata) -> ResultBuffers:
    """Allocate the result; rows without a pair are copied."""
    if x.data_ptr() % 16:  # kernels are compiled for aligned tensors; a window may begin anywhere
        x = x.clone()
    whole = metadata.touched == x.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if whole else _copy(x)
    pairs = 0 if metadata.sums is None else metadata.rows.shape[0]
    new = torch.zeros if metadata.has_idle_pairs else torch.empty
    changes = new(pairs, x.shape[1], dtype=torch.float32, device=x.device)
    return ResultBuffers(x, out, changes, fused=metadata.sums is None)


def add_changes(
    target: ResultBuffers, weights: SteerWeights, metadata: BatchMetadata
) -> torch.Tensor:
    """Add the changes of constant slots, then sum all changes per row; returns the result."""
    x, out, width = target.x, target.out, target.width
    blocks = triton.cdiv(width, BLOCK_WIDTH)
    if metadata.constant is not None:
        constant[(metadata.constant.bounds.shape[0], blocks)](
            x,
            weights.vectors,
            metadata.rows,
            metadata.scales,
            metadata.constant.bounds,
            metadata.constant.epsilons,
            out,
            target.changes,
            width,
            *x.stride(),
            FUSED=target.fused,
            BLOCK_WIDTH=BLOCK_WIDTH,
            **EXACT,
        )
    if metadata.sums is not None:
        add_up[(metadata.sums.rows.shape[0], blocks)](
            x,
            target.changes,
            metadata.sums.rows,
            metadata.sums.starts,
            metadata.sums.order,
            out,
            width,
            *x.stride(),
            BLOCK_WIDTH=BLOCK_WIDTH,
            **EXACT,
        )
    return out


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
