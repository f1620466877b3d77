"""Which form of an operation runs: the one place that decides.

Every operation has a written-out ``reference``, a plain-torch form for every device, and Triton
forms. ``auto`` takes Triton on a CUDA device and torch elsewhere. What was asked for by name is had
or refused: there is no falling back.
"""

import importlib.util
from typing import Literal, get_args

import torch

from vllm_steer.kernels.divergence.form import DivergenceForm
from vllm_steer.kernels.guidance.form import GuidanceForm
from vllm_steer.kernels.lm_steer.form import LMSteerForm

Kernels = Literal["auto", "triton", "torch"]

FEW_ROWS = 8


class KernelError(ValueError):
    """A form of an operation cannot be had."""


def lm_steer_form(kernels: str, device: torch.device, *, max_rows: int) -> LMSteerForm:
    """The form of LM-Steer for an engine whose batches have up to ``max_rows`` rows.

    Up to ``FEW_ROWS`` rows every pair of row and steer has its own programs, beyond that rows share
    tiles. The two round differently, so the engine decides and not the batch: a row's result must
    not depend on how many rows came with it. Raises ``KernelError`` as ``backend`` does.
    """
    if backend(kernels, device) == "torch":
        from vllm_steer.kernels.lm_steer import grouped

        return grouped
    if max_rows <= FEW_ROWS:
        from vllm_steer.kernels.lm_steer.by_row import BY_ROW

        return BY_ROW
    from vllm_steer.kernels.lm_steer.by_tile import BY_TILE

    return BY_TILE


def guidance_form(kernels: str, device: torch.device) -> GuidanceForm:
    """The form of activation guidance. Raises ``KernelError`` as ``backend`` does."""
    if backend(kernels, device) == "torch":
        from vllm_steer.kernels.guidance import gather, host

        return host if device.type == "cpu" else gather
    from vllm_steer.kernels.guidance import fused

    return fused


def divergence_form(kernels: str, device: torch.device) -> DivergenceForm:
    """The form of the divergence behind a dynamic strength.

    Raises ``KernelError`` as ``backend`` does.
    """
    if backend(kernels, device) == "torch":
        from vllm_steer.kernels.divergence import by_sort, on_host

        return on_host if device.type == "cpu" else by_sort
    from vllm_steer.kernels.divergence import fused

    return fused


def backend(kernels: str, device: torch.device) -> Literal["triton", "torch"]:
    """What ``kernels`` means on ``device``.

    Raises ``KernelError`` for a name that does not exist, for Triton without its package, and for
    Triton on a device other than CUDA unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
    """
    if kernels not in get_args(Kernels):
        raise KernelError(f"kernels is {kernels!r}; allowed: {', '.join(get_args(Kernels))}")
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
