"""Activation guidance as two operations of one step: map the tokens, then steer them per layer.

``reference`` spells the equations out, ``gather`` is plain torch and runs on every device, ``host``
works a step out ahead of its layers where that is cheap, ``fused`` is Triton; ``dispatch`` beside
this folder chooses.
"""

from vllm_steer.kernels.guidance.form import GuidanceForm
from vllm_steer.kernels.guidance.host import HostChanges
from vllm_steer.kernels.guidance.operands import Directions, Rules, TokenMap

__all__ = ["Directions", "GuidanceForm", "HostChanges", "Rules", "TokenMap"]
