"""The rows of a dummy run: alike at its start, with attention that returns a fixed pattern."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def fixed_attention(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let attention return one pattern: without metadata it leaves its output unwritten.

    vLLM's Transformers backend calls ``forward`` itself, where a hook is not called.
    """
    try:
        for layer in layers:
            layer.forward = _with_fixed_pattern(layer.forward)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _with_fixed_pattern(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for tensor in tensors_of(output):
            if tensor.is_floating_point():
                wave = torch.arange(tensor.shape[-1], dtype=torch.float32, device=tensor.device)
                tensor.copy_((0.1 * torch.cos(wave)).to(tensor.dtype))
        return output

    return wrapper


def tensors_of(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, Mapping):
        return tensors_of(list(values.values()))
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in tensors_of(value)]
    return []


def rows_of(value: Any, num_rows: int, width: int) -> torch.Tensor | None:
    """A tensor of hidden states as ``[num_rows, width]``, a view; None for any other value.

    Rows may be apart in memory, as where a wider tensor is cut to the model's width.
    """
    is_hidden = (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.shape[-1:] == (width,)
        and value.numel() == num_rows * width
        and value.stride(-1) == 1
        and (value.dim() == 2 or value.is_contiguous())
    )
    return value.view(num_rows, width) if is_hidden else None


def hidden_states_of(values: Any, num_rows: int, width: int) -> list[torch.Tensor]:
    """The hidden states among values and their parts, each as ``[num_rows, width]``."""
    views = (rows_of(tensor, num_rows, width) for tensor in tensors_of(values))
    return [view for view in views if view is not None]


def make_alike(streams: Sequence[torch.Tensor], row: torch.Tensor) -> None:
    """Make all rows of a layer's input alike: ``row`` in the first tensor, zero in others."""
    for index, rows in enumerate(streams):
        rows.copy_(row.to(rows).expand_as(rows) if index == 0 else torch.zeros_like(rows))
