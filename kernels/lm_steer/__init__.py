"""LM-Steer as an operation over the rows of one batch.

``lm_steer`` is one function over plain tensors, for use outside an engine. Behind it, ``reference``
is the equation in float64, ``torch_grouped`` runs on every device, ``triton_tiled`` and
``triton_rowwise`` run on CUDA. All implement ``LMSteerBackend``; ``dispatch`` selects one.
"""

from vllm_steer.kernels.lm_steer.backend import GraphLMSteerBackend, LMSteerBackend
from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerWeights,
)
from vllm_steer.kernels.lm_steer.ops import lm_steer

__all__ = [
    "Constant",
    "Dense",
    "GraphLMSteerBackend",
    "LMSteerBackend",
    "LowRank",
    "Slot",
    "SteerWeights",
    "SteeredRows",
    "lm_steer",
]
