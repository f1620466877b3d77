"""LM-Steer as one function over plain tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_steer.kernels.lm_steer.backend import LMSteerBackend
from vllm_steer.kernels.lm_steer.operands import LowRank, SteeredRows, SteerWeights

NO_STEER = -1


@torch.no_grad()
def lm_steer(
    x: torch.Tensor,
    projector1: Sequence[torch.Tensor] | torch.Tensor,
    projector2: Sequence[torch.Tensor] | torch.Tensor,
    steer_of_row: torch.Tensor,
    scale: torch.Tensor,
    *,
    backend: str = "auto",
    max_rows: int | None = None,
) -> torch.Tensor:
    """Apply low-rank LM-Steers to the rows of a batch, each row with its own steers and scales.

    For each row ``t`` and each ``k`` with ``s = steer_of_row[t, k] >= 0``, added up over ``k``::

        out[t] = x[t] + scale[t, k] * (x[t] @ projector1[s]) @ projector2[s].T

    This is the change ``c += epsilon * v * (c P1) P2^T`` at the input ``c`` of the LM head (Han et
    al., ACL 2024, arXiv 2305.12798, section 3), with ``scale = epsilon * v``.

    Args:
        x: ``[T, width]`` in float32, float16 or bfloat16; any strides. ``T`` may be 0.
        projector1: The P1 of each steer: ``[S, width, rank]``, or a sequence of ``[width, rank]``
            tensors whose ranks may differ. Ranks are stored side by side, without padding.
        projector2: The P2 of each steer, of the same shapes.
        steer_of_row: ``[T]`` or ``[T, K]``, integers: the steers of each row, -1 for none. A row
            names a steer once.
        scale: The shape of ``steer_of_row``: epsilon times strength. A scale of 0 changes nothing.
        backend: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``torch``, or
            ``reference`` (float64, one row at a time).
        max_rows: On CUDA, kernels for few and for many rows round differently. Calls with one
            ``max_rows`` use the same kernels. The default is ``T``.

    Returns:
        A new tensor ``[T, width]`` in ``x``'s dtype, on its device. A row without a steer is a copy
        of ``x``, bit for bit.

    Devices: all tensors are moved to the device of ``x``. ``steer_of_row`` and ``scale`` are read
    on the host: on the device they cost a synchronisation. A server calls ``prepare`` of a backend
    when its batch changes, and ``steer_rows``, which has none, in each step.

    Determinism: no atomic additions; the steers of a row are added in ascending order. On Triton a
    row's result does not depend on the rows beside it; in PyTorch it depends on what the matrix
    products of the installed BLAS library do.

    Autograd: no gradient flows through this function.

    Raises:
        ValueError: Shapes that do not fit, an index that is no steer, or a row that names a steer
            twice.
        KernelError: A backend that is not available here (a ``ValueError``).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        >>> p1 = torch.tensor([[[1.0], [0.0]]])  # one steer of rank 1
        >>> p2 = torch.tensor([[[0.0], [10.0]]])
        >>> lm_steer(x, p1, p2, torch.tensor([-1, 0]), torch.tensor([0.0, 0.5]))
        tensor([[1., 2.],
                [1., 7.]])
    """
    weights = _weights(x, list(projector1), list(projector2))
    steered = _steered_rows(x.shape[0], steer_of_row, scale, len(weights.slots))
    if steered is None:
        return x.clone(memory_format=torch.contiguous_format)
    operation = _backend(backend, x.device, x.shape[0] if max_rows is None else max_rows)
    steered_x: torch.Tensor = operation.steer_rows(
        x, weights, operation.prepare(steered, weights, x.device)
    )
    return steered_x


def _backend(name: str, device: torch.device, max_rows: int) -> LMSteerBackend:
    if name == "reference":
        from vllm_steer.kernels.lm_steer import reference

        return reference
    from vllm_steer.kernels.dispatch import lm_steer_backend

    return lm_steer_backend(name, device, max_rows=max_rows)


def _weights(
    x: torch.Tensor, projector1: list[torch.Tensor], projector2: list[torch.Tensor]
) -> SteerWeights:
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected [rows, width]")
    if len(projector1) != len(projector2):
        raise ValueError(
            f"projector1 has {len(projector1)} steers and projector2 {len(projector2)}; expected "
            "the same number"
        )
    width, slots, rank = x.shape[1], [], 0
    for steer, (first, second) in enumerate(zip(projector1, projector2, strict=True)):
        if first.dim() != 2 or first.shape != second.shape or first.shape[0] != width:
            raise ValueError(
                f"steer {steer} has projectors of shapes {list(first.shape)} and "
                f"{list(second.shape)}; expected [{width}, rank] twice"
            )
        slots.append(LowRank(rank, rank + first.shape[1], rank + first.shape[1], 1.0))
        rank += first.shape[1]
    return SteerWeights(
        slots=tuple(slots),
        shrink=_packed(projector1, x),
        expand=_packed(projector2, x),
        dense=x.new_empty(0, width, width),
        vectors=x.new_empty(0, width),
    )


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _packed(projectors: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``[total rank, width]`` in the dtype and on the device of ``x``."""
    parts = [projector.to(x.device, x.dtype).T for projector in projectors]
    return torch.cat(parts).contiguous() if parts else x.new_empty(0, x.shape[1])


def _steered_rows(
    num_rows: int, steer_of_row: torch.Tensor, scale: torch.Tensor, num_steers: int
) -> SteeredRows | None:
    shape = steer_of_row.shape
    if shape != scale.shape or shape[:1] != (num_rows,) or len(shape) > 2:
        raise ValueError(
            f"steer_of_row has shape {list(steer_of_row.shape)} and scale {list(scale.shape)}; "
            f"expected [{num_rows}] or [{num_rows}, K] for both"
        )
    if steer_of_row.is_floating_point():
        raise ValueError(f"steer_of_row has dtype {steer_of_row.dtype}; expected integers")
    slots = _columns(steer_of_row).cpu().numpy().astype(np.int64)
    if slots.size and (slots.max() >= num_steers or slots.min() < NO_STEER):
        raise ValueError(
            f"steer_of_row has values from {slots.min()} to {slots.max()}; expected -1 (none) or "
            f"one of {num_steers} steers"
        )
    rows, columns = np.nonzero(slots != NO_STEER)
    if not rows.size:
        return None
    pair_slots = slots[rows, columns]
    scales = _columns(scale).float().cpu().numpy()[rows, columns]
    order = np.lexsort((rows, pair_slots))
    rows, pair_slots, scales = rows[order], pair_slots[order], scales[order]
    if ((np.diff(rows) == 0) & (np.diff(pair_slots) == 0)).any():
        raise ValueError("a row of steer_of_row names a steer twice; add its scales up")
    slot, start = np.unique(pair_slots, return_index=True)
    end = [*start[1:], len(rows)]
    groups = zip(slot.tolist(), start.tolist(), map(int, end), strict=True)
    return SteeredRows(rows, scales, tuple(groups))
