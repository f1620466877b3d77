"""Dynamic Activation Composition: strengths computed from the effect of a steer at each step."""

from vllm_steer.doses import KLS, Kl
from vllm_steer.dynamic.strength import dynamic_strength, strength_of_rows

__all__ = ["KLS", "Kl", "dynamic_strength", "strength_of_rows"]
