"""Checks that steers of every kind share."""

import math

import torch

from vllm_steer.errors import SteerError
from vllm_steer.foreign import shown


def check_tensor(name: str, tensor: torch.Tensor, *, dims: int) -> None:
    """Raise ``SteerError`` unless it is floating, of ``dims`` dimensions, not empty and finite."""
    if not tensor.is_floating_point():
        raise SteerError(f"tensor {name} is {tensor.dtype}; a floating dtype is wanted")
    if tensor.ndim != dims or 0 in tensor.shape:
        raise SteerError(
            f"tensor {name} is {list(tensor.shape)}; wanted: {dims} dimensions, none of size 0"
        )
    finite = torch.isfinite(tensor.float())
    if not finite.all():
        bad = int((~finite).sum())
        raise SteerError(f"tensor {name} has {bad} values that are NaN or infinite")


def check_default_strength(strength: float | None) -> None:
    """Raise ``SteerError`` for a default that is not finite."""
    if strength is not None and not math.isfinite(strength):
        raise SteerError(f"default_strength is {strength}; it must be finite")


def check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    """Raise ``SteerError`` for a word that is not one of the allowed."""
    if given not in allowed:
        raise SteerError(f"{name} is {shown(given)}; allowed: {', '.join(allowed)}")
