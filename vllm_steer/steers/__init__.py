"""The kinds of steers: one frozen dataclass per kind, validated on creation."""

from typing import get_args

from vllm_steer.steers.delta import DeltaSteer
from vllm_steer.steers.lm_steer import LMSteer, Variant
from vllm_steer.steers.schedules import Schedule
from vllm_steer.steers.vector import Mode, VectorSteer

Steer = LMSteer | VectorSteer | DeltaSteer

KINDS: dict[str, type[Steer]] = {cls.kind: cls for cls in get_args(Steer)}

__all__ = [
    "KINDS",
    "DeltaSteer",
    "LMSteer",
    "Mode",
    "Schedule",
    "Steer",
    "Variant",
    "VectorSteer",
]
