"""Selects the backend of each operation.

Every operation has a backend in plain PyTorch for every device and Triton backends; LM-Steer and
guidance also have a ``reference`` in float64. ``auto`` selects Triton on a CUDA device and PyTorch
elsewhere. An explicit choice is used or raises ``KernelError``; there is no silent fallback.
"""

import importlib.util
from typing import Literal, get_args

import torch

from vllm_steer.kernels.divergence.backend import DivergenceBackend
from vllm_steer.kernels.guidance.backend import GuidanceBackend
from vllm_steer.kernels.lm_steer.backend import LMSteerBackend

Kernels = Literal["auto", "triton", "torch"]

FEW_ROWS = 8


class KernelError(ValueError):
    """The requested backend is not available."""


def lm_steer_backend(kernels: str, device: torch.device, *, max_rows: int) -> LMSteerBackend:
    """The backend of LM-Steer for an engine whose batches have up to ``max_rows`` rows.

    Up to ``FEW_ROWS`` rows each (row, steer) pair has its own programs; above, rows share tiles.
    The two round differently, so the choice depends on the engine's limit and not on the batch: a
    row's result must not depend on the batch size. Raises ``KernelError`` as ``resolve_kernels``
    does.
    """
    if resolve_kernels(kernels, device) == "torch":
        from vllm_steer.kernels.lm_steer import torch_grouped

        return torch_grouped
    if max_rows <= FEW_ROWS:
        from vllm_steer.kernels.lm_steer.triton_rowwise import ROWWISE

        return ROWWISE
    from vllm_steer.kernels.lm_steer.triton_tiled import TILED

    return TILED


def guidance_backend(kernels: str, device: torch.device) -> GuidanceBackend:
    """The backend of activation guidance. Raises ``KernelError`` as ``resolve_kernels`` does."""
    if resolve_kernels(kernels, device) == "torch":
        from vllm_steer.kernels.guidance import cpu, torch_gather

        return cpu if device.type == "cpu" else torch_gather
    from vllm_steer.kernels.guidance import triton_fused

    return triton_fused


def divergence_backend(kernels: str, device: torch.device) -> DivergenceBackend:
    """The backend of the KL divergence that a dynamic strength is computed from.

    Raises ``KernelError`` as ``resolve_kernels`` does.
    """
    if resolve_kernels(kernels, device) == "torch":
        from vllm_steer.kernels.divergence import cpu, torch_sort

        return cpu if device.type == "cpu" else torch_sort
    from vllm_steer.kernels.divergence import triton_fused

    return triton_fused


def resolve_kernels(kernels: str, device: torch.device) -> Literal["triton", "torch"]:
    """Select Triton or PyTorch for ``kernels`` on ``device``.

    Raises ``KernelError`` for a name that does not exist, for Triton without its package, and for
    Triton on a device other than CUDA unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
    """
    if kernels not in get_args(Kernels):
        raise KernelError(f"kernels is {kernels!r}; expected one of {', '.join(get_args(Kernels))}")
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            f"kernels is {kernels} on {device.type}, and triton is not installed; install it, or "
            "set kernels: torch"
        )
    if device.type != "cuda" and not _interpreted():
        raise KernelError(
            f"kernels is triton, and the device is {device.type}: Triton kernels need a CUDA "
            "device; set kernels: auto or torch (or TRITON_INTERPRET=1, for tests)"
        )
    return "triton"


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
