"""Batches that compile every kernel a bank can need, before the first request."""

from collections.abc import Iterator

import numpy as np
import torch

from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerWeights

PADDING = 64  # vLLM's, of the logits: they reach the kernels as a window of longer rows


def batches(
    weights: SteerWeights, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, SteeredRows]]:
    """A slot of each kind on a row by itself, then all of these on one row, twice for a sum.

    Triton compiles anew for a row stride that 16 divides, so an odd width is seen padded as well.
    """
    _, slots = np.unique(weights.columns.kinds, return_index=True)
    width = weights.width
    strides = {width, -(-width // PADDING) * PADDING} if width % 16 else {width}
    for stride in sorted(strides):
        x = torch.zeros(2, stride, dtype=dtype, device=weights.expand.device)[:, :width]
        for slot in slots.tolist():
            yield x, _on_first_row([slot])
        yield x, _on_first_row(sorted([*slots.tolist(), *slots.tolist()]))


def _on_first_row(slots: list[int]) -> SteeredRows:
    return SteeredRows(
        rows=np.zeros(len(slots), dtype=np.int64),
        scales=np.ones(len(slots), dtype=np.float32),
        groups=tuple(
            (slot, slots.index(slot), slots.index(slot) + slots.count(slot))
            for slot in dict.fromkeys(slots)
        ),
    )
