"""Steer how a language model writes while vLLM serves it, request by request."""

from vllm_steer import hf
from vllm_steer.config import SteerConfig
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.files import load_steer, save_steer
from vllm_steer.steer import LMSteer, Steer

__version__ = "0.1.0"

__all__ = [
    "LMSteer",
    "Steer",
    "SteerConfig",
    "SteerError",
    "SteerRequestError",
    "hf",
    "load_steer",
    "save_steer",
]
