"""Steer how a language model writes while vLLM serves it, request by request."""

from vllm_steer import hf
from vllm_steer.config import SteerConfig
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.files import load_steer, save_steer
from vllm_steer.steers import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.version import __version__ as __version__

__all__ = [
    "DeltaSteer",
    "LMSteer",
    "Steer",
    "SteerConfig",
    "SteerError",
    "SteerRequestError",
    "VectorSteer",
    "hf",
    "load_steer",
    "save_steer",
]
