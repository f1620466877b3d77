"""Directions at ``heads``, projected once: the attention's output projection is linear.

Adding ``W delta`` to its output is adding ``delta`` to its input. A quantised projection is linear
as far as its quantiser is: one with a fixed input scale clamps what is too large and loses what is
too small. So rows are projected at a scale at which the result grows as the rows do.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn

from vllm_steer.errors import SteerError
from vllm_steer.families import Family, submodule

_SCALES: Final = tuple(2.0 ** (n / 2) for n in range(24, -26, -1))
_TOLERANCE: Final = 0.05
"""Of the difference between the results at two scales, in norms of the result."""


def projections(
    layers: nn.ModuleList, families: Mapping[int, Family], dtype: torch.dtype
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function from a layer and rows at its ``heads`` to the same at the projection's output.

    Every tensor-parallel rank gives the projection the heads that it owns; the projection itself
    sums over the ranks. Its bias is taken out again. The function raises ``SteerError`` for rows of
    another width, and where the projection is not linear at any scale.
    """

    def project(layer: int, rows: torch.Tensor) -> torch.Tensor:
        attention = submodule(layers[layer], families[layer].attention, "heads")
        projection = submodule(attention, families[layer].projection, "heads")
        projection = getattr(projection, "base_layer", projection)

        def apply(rows: torch.Tensor) -> torch.Tensor:
            local_rows = _local_columns(projection, rows).to(dtype)
            with torch.inference_mode():
                both = _first(projection(torch.cat([local_rows, torch.zeros_like(local_rows[:1])])))
                return (both[:-1] - both[-1:]).float().clone()

        return project_linearly(apply, rows, f"layer {layer}")

    return project


def project_linearly(
    apply: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, place: str
) -> torch.Tensor:
    """``apply(rows)`` for rows ``[n, width]``, where ``apply`` is linear.

    Rows that do not give 64 times as much when multiplied by 64 are brought to one largest value,
    and that to the largest one between 2**-12 and 2**12 up to which results grow as the rows do.
    Raises ``SteerError`` if there is none.
    """
    projected, larger = apply(rows), apply(rows * 64) / 64
    if bool(_agree(projected, larger, rows).all()) or not torch.isfinite(projected).all():
        return projected  # the caller names a steer whose values are not finite
    largest = rows.abs().amax(1, keepdim=True)
    size = torch.where(largest > 0, largest, 1.0)
    trials = [apply(rows / size * scale) / scale for scale in _SCALES]
    is_zero = ~torch.stack([trial.norm(dim=1) > 0 for trial in trials]).any(0)  # at every scale
    for larger, projected in pairwise(trials):
        if bool((_agree(projected, larger, rows) | is_zero).all()):
            scaled: torch.Tensor = projected * size
            return scaled
    raise SteerError(
        f"the attention's output projection of {place} is quantised in such a way that steps at "
        "heads cannot be projected through it (its output does not grow as its input does); "
        "use a model whose projection has no static input scale, or steer at attn_out"
    )


def _agree(projected: torch.Tensor, larger: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Whether each row's results of two scales agree; no row but zero may vanish."""
    size = larger.norm(dim=1)
    is_seen = (size > 0) | (rows == 0).all(1)
    agreed: torch.Tensor = ((projected - larger).norm(dim=1) <= _TOLERANCE * size) & is_seen
    return agreed


def _local_columns(projection: Any, rows: torch.Tensor) -> torch.Tensor:
    """The columns of the heads that this rank's projection takes."""
    whole = getattr(projection, "input_size", rows.shape[1])
    local_width = getattr(projection, "input_size_per_partition", whole)
    if rows.shape[1] != whole:
        raise SteerError(f"a steer at heads is {rows.shape[1]} wide; the model's heads are {whole}")
    start = getattr(projection, "tp_rank", 0) * local_width
    return rows[:, start : start + local_width]


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
