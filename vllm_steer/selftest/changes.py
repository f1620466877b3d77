"""What a steer changes in a dummy run: a place in the model, in two rows that begin alike."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_steer.selftest.dummy_rows import fixed_attention, make_alike, rows_of, tensors_of


@dataclass(frozen=True)
class Place:
    """A module whose first output tensor is steered, or, as a ``pair``, the sum of its two."""

    module: nn.Module
    is_pair: bool


def place_rows(
    places: Sequence[Place],
    first_layer: nn.Module,
    width: int,
    run: Callable[[int], Any],
    attention_layers: Sequence[nn.Module],
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Each place's tensor in row 0 and in the place's own row, ``[width]`` in float64.

    None for a place that the run does not reach.

    Place i has row i + 1. ``run(n)`` is a dummy run of n rows, eager; all begin alike at
    ``first_layer``, so a place's own row differs from row 0 there by what a steer adds in that row.
    """
    num_rows = len(places) + 1
    row = torch.randn(width, generator=torch.Generator().manual_seed(1))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(_module: Any, args: Any, kwargs: Any) -> None:
        views = [rows_of(tensor, num_rows, width) for tensor in tensors_of((args, kwargs))]
        make_alike([view for view in views if view is not None], row)

    def keep(index: int, place: Place) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            tensors = [rows_of(tensor, num_rows, width) for tensor in tensors_of(output)]
            parts = [
                tensor for tensor in tensors[: 2 if place.is_pair else 1] if tensor is not None
            ]
            if parts:
                base, own = (
                    torch.stack([part[r] for part in parts]).double().sum(0).cpu()
                    for r in (0, index + 1)
                )
                seen[index] = (base, own)

        return hook

    with ExitStack() as hooks, fixed_attention(attention_layers), torch.inference_mode():
        handle = first_layer.register_forward_pre_hook(begin, with_kwargs=True)
        hooks.callback(handle.remove)
        for index, place in enumerate(places):
            hooks.callback(place.module.register_forward_hook(keep(index, place)).remove)
        run(num_rows)
    return [seen.get(index) for index in range(len(places))]
