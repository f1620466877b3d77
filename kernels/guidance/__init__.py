"""Activation guidance in two operations per step: map the tokens, then steer them in each layer.

``steer_tokens`` is one function over plain tensors, for use outside an engine. Behind it,
``reference`` is the equations in float64, ``torch_gather`` runs on every device, ``cpu`` computes
the changes of all layers before the forward pass, ``triton_fused`` runs on CUDA. All but the
reference implement ``GuidanceBackend``; ``dispatch`` selects one.
"""

from vllm_steer.kernels.guidance.backend import GuidanceBackend
from vllm_steer.kernels.guidance.cpu import StepChanges
from vllm_steer.kernels.guidance.operands import (
    GAINS,
    PLACEHOLDER_STRIDE,
    Conditions,
    Directions,
    Gates,
    Readings,
    TokenMap,
    TokenRules,
)
from vllm_steer.kernels.guidance.ops import steer_tokens

__all__ = [
    "GAINS",
    "PLACEHOLDER_STRIDE",
    "Conditions",
    "Directions",
    "Gates",
    "GuidanceBackend",
    "Readings",
    "StepChanges",
    "TokenMap",
    "TokenRules",
    "steer_tokens",
]
