"""The kinds of steers: one frozen dataclass per kind, validated on creation."""

from typing import get_args

from vllm_steer.steers.condition import ConditionSteer, Side, Similarity, Tokens
from vllm_steer.steers.delta import DeltaSteer
from vllm_steer.steers.lm_steer import LMSteer, Variant
from vllm_steer.steers.low_rank import LowRankSteer
from vllm_steer.steers.sae import SAEMode, SAESteer
from vllm_steer.steers.schedules import Schedule
from vllm_steer.steers.vector import Mode, VectorSteer

Steer = LMSteer | VectorSteer | DeltaSteer | LowRankSteer | SAESteer | ConditionSteer

KINDS: dict[str, type[Steer]] = {cls.kind: cls for cls in get_args(Steer)}

__all__ = [
    "KINDS",
    "ConditionSteer",
    "DeltaSteer",
    "LMSteer",
    "LowRankSteer",
    "Mode",
    "SAEMode",
    "SAESteer",
    "Schedule",
    "Side",
    "Similarity",
    "Steer",
    "Tokens",
    "Variant",
    "VectorSteer",
]
