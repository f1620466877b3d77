"""Dynamic Activation Composition: strengths that follow from what a steer does, step by step."""

from vllm_steer.doses import KLS, Kl
from vllm_steer.dynamic.strength import dynamic_strength, strength_of_rows

__all__ = ["KLS", "Kl", "dynamic_strength", "strength_of_rows"]
