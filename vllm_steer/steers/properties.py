"""What a steer inside the layers is, in plain data: its options, and the norm of each layer."""

import math
from typing import Any

import torch

from vllm_steer.steers.condition import ConditionSteer
from vllm_steer.steers.delta import DeltaSteer
from vllm_steer.steers.low_rank import LowRankSteer
from vllm_steer.steers.sae import SAESteer
from vllm_steer.steers.vector import VectorSteer

LayeredSteer = VectorSteer | DeltaSteer | LowRankSteer | SAESteer | ConditionSteer
"""The steers that act inside the layers."""


def properties(steer: LayeredSteer) -> dict[str, Any]:
    """The options of this kind of steer as JSON values; an infinite bound is a text."""
    if isinstance(steer, DeltaSteer):
        return {"schedule": steer.schedule, "steps": steer.steps}
    if isinstance(steer, LowRankSteer):
        return {"rank": steer.rank}
    if isinstance(steer, ConditionSteer):
        names = ("similarity", "side", "threshold", "tokens")
        return {name: getattr(steer, name) for name in names}
    bounds = {"low": _bound(steer.low), "high": _bound(steer.high)} if steer.has_bounds else {}
    return {"mode": steer.mode, **bounds}


def layer_norms(steer: LayeredSteer) -> torch.Tensor:
    """The norm of what a steer adds per layer at strength 1, ``[layers]`` in float64.

    Of a vector its norm, of a delta the largest over its steps, of a low-rank map the Frobenius
    norm of ``B A``, of an SAE's feature that of its decoder row, of a condition that of its vector,
    which is not added.
    """
    if isinstance(steer, LowRankSteer):
        a, b = steer.a.double(), steer.b.double()
        products = (b.mT @ b) * (a @ a.mT)
        return products.sum(dim=(1, 2)).clamp_min(0).sqrt()
    if isinstance(steer, DeltaSteer):
        return _lengths(steer.delta).amax(dim=0)
    tensors = steer.tensors
    vectors = next(tensors[name] for name in ("vectors", "decoder", "vector") if name in tensors)
    return _lengths(vectors)


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(vectors.double(), dim=-1)
    return norms


def _bound(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
