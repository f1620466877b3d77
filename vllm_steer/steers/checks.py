"""Checks shared by all kinds of steers."""

import math
from collections.abc import Iterator
from typing import Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import shown

LARGEST: Final = float(torch.finfo(torch.float32).max)
_PIECE_VALUES: Final = 1 << 20


def check_tensor(name: str, tensor: torch.Tensor, *, dims: int) -> None:
    """Raise ``SteerError`` unless it is floating, of ``dims`` dimensions, not empty and finite."""
    if not tensor.is_floating_point():
        raise SteerError(f"tensor {name} is {tensor.dtype}; expected a floating dtype")
    if tensor.ndim != dims or 0 in tensor.shape:
        raise SteerError(
            f"tensor {name} is {list(tensor.shape)}; expected {dims} dimensions, none of size 0"
        )
    num_invalid = sum(map(_num_invalid, pieces(tensor)))
    if num_invalid:
        raise SteerError(f"tensor {name} has {num_invalid} values that are NaN or infinite")


def _num_invalid(piece: torch.Tensor) -> int:
    values = piece.float()
    if math.isfinite(values.sum(dtype=torch.float64)):  # one pass, without a mask
        return 0
    return int((~torch.isfinite(values)).sum())


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in order, in pieces, to bound the memory of computations on them."""
    for row in tensor if tensor.ndim > 1 else (tensor,):
        yield from row.detach().reshape(-1).split(_PIECE_VALUES)


def check_default_strength(strength: float | None) -> None:
    """Raise ``SteerError`` for a default strength that is not finite."""
    if strength is not None and not math.isfinite(strength):
        raise SteerError(f"default_strength is {strength}; it must be finite")


def check_bounds(low: float, high: float, mode: str, *, has_bounds: bool) -> None:
    """Raise ``SteerError`` for bounds that are out of order, or that ``mode`` does not have."""
    if not has_bounds and (low, high) != (0.0, 0.0):
        raise SteerError(f"low and high do not apply to mode {mode}; remove them")
    if any(math.isfinite(bound) and abs(bound) > LARGEST for bound in (low, high)):
        raise SteerError(f"low is {low} and high is {high}; float32 has numbers up to {LARGEST:g}")
    if not low <= high or low == math.inf or high == -math.inf:  # NaN too
        raise SteerError(f"low is {low} and high is {high}; low must be at most high")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``SteerError`` for a value that is not allowed."""
    if value not in allowed:
        raise SteerError(f"{name} is {shown(value)}; allowed: {', '.join(allowed)}")
