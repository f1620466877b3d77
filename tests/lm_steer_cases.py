"""The paper's formula of LM-Steer written out in float64, and steers for the tests to give it.

``delta = epsilon * sum_c a_c (x P1_c) P2_c^T`` with ``a_c`` the row's strength, or 1 for a fixed
column (Han et al. 2024, section 3); at strength 0 there is no delta. Steers are given
to the formula as the authors store them and to the operation as packed weights.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_steer.kernels.lm_steer import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerWeights,
)

Use = tuple[int, int, float]  # row, slot, strength


@dataclass
class Weights:
    """One steer as the authors store it: ``first``, ``second`` ``[columns, width, rank]``, the
    last ``fixed`` columns being fixed; ``first`` None for a steer that adds a vector."""

    first: torch.Tensor | None
    second: torch.Tensor
    fixed: int
    epsilon: float


def weights_of(steers: list[Weights], stored: str = "low-rank") -> SteerWeights:
    """The steers as packed weights; those that multiply ``low-rank``, ``dense`` or in turn both."""
    weights: dict[str, list[torch.Tensor]] = {
        "shrink": [],
        "expand": [],
        "dense": [],
        "vectors": [],
    }
    slots: list[Slot] = []

    def keep(name: str, tensor: torch.Tensor) -> int:
        weights[name].append(tensor[None])
        return len(weights[name]) - 1

    rank = 0
    for number, steer in enumerate(steers):
        free = steer.second.shape[0] - steer.fixed
        parts = [slice(0, free), slice(free, None)][: 2 if steer.fixed else 1]
        if steer.first is None:
            tensors = [keep("vectors", steer.second[part, :, 0].sum(0)) for part in parts]
            slots.append(Constant(tensors[0], tensors[1] if steer.fixed else None, steer.epsilon))
        elif stored == "dense" or (stored == "both" and number % 2):
            product = torch.einsum("cir,cor->coi", steer.first.double(), steer.second.double())
            tensors = [keep("dense", product[part].sum(0).to(steer.second)) for part in parts]
            slots.append(Dense(tensors[0], tensors[1] if steer.fixed else None, steer.epsilon))
        else:
            start, rank = rank, rank + steer.second.shape[0] * steer.second.shape[2]
            weights["shrink"].append(torch.cat([column.T for column in steer.first]))
            weights["expand"].append(torch.cat([column.T for column in steer.second]))
            fixed_from = start + free * steer.second.shape[2]
            slots.append(LowRank(start, fixed_from, rank, steer.epsilon))
    some = steers[0].second
    width = some.shape[1]
    empty = {"dense": some.new_empty(0, width, width)}
    whole = {
        name: torch.cat(weight) if weight else empty.get(name, some.new_empty(0, width))
        for name, weight in weights.items()
    }
    return SteerWeights(slots=tuple(slots), **whole)


def steered(uses: list[Use], steers: list[Weights]) -> SteeredRows:
    """The uses as sorted pairs."""
    uses = sorted(uses, key=lambda use: (use[1], use[0]))
    rows = [row for row, _, _ in uses]
    groups, start = [], 0
    for slot, group in itertools.groupby(uses, key=lambda use: use[1]):
        end = start + len(list(group))
        groups.append((slot, start, end))
        start = end
    return SteeredRows(
        rows=np.array(rows, dtype=np.int64),
        scales=np.array([v * steers[slot].epsilon for _, slot, v in uses], dtype=np.float32),
        groups=tuple(groups),
    )


def at_strengths(uses: list[Use], strengths: Sequence[float]) -> list[Use]:
    """The same rows and slots with repeated strengths, in the order of the pairs: by slot, then by
    row.
    """
    ordered = sorted(uses, key=lambda use: (use[1], use[0]))
    repeated_strengths = itertools.cycle(strengths)
    return [(row, slot, next(repeated_strengths)) for row, slot, _ in ordered]


def formula(x: torch.Tensor, steers: list[Weights], uses: list[Use]) -> torch.Tensor:
    """The steered rows in float64."""
    y = x.double().clone()
    for row, slot, strength in uses:
        if strength == 0:
            continue
        steer = steers[slot]
        columns = steer.second.shape[0]
        a = torch.full((columns,), strength, dtype=torch.float64, device=x.device)
        a[columns - steer.fixed :] = 1.0
        if steer.first is None:
            delta = torch.einsum("c,cd->d", a, steer.second[:, :, 0].double())
        else:
            inner = torch.einsum("d,cdr->cr", x[row].double(), steer.first.double())
            delta = torch.einsum("c,cr,cdr->d", a, inner, steer.second.double())
        y[row] += steer.epsilon * delta
    return y


def random_rows(num_rows: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_rows, width, generator=generator).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of the numbers, to compare NaN and signed zeros."""
    same_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(same_size)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error divided by the norm of the expected result."""
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).norm() / expected.norm())


SPECIAL = {
    torch.float32: [0x00000000, -0x80000000, 0x7F800000, -0x00800000, 0x7FC00001, 0x7F800001],
    torch.float16: [0x0000, -0x8000, 0x7C00, -0x0400, 0x7E01, 0x7C01],
    torch.bfloat16: [0x0000, -0x8000, 0x7F80, -0x0080, 0x7FC1, 0x7F81],
}
"""Patterns of both zeros, both infinities, a quiet and a signalling NaN."""
