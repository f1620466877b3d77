"""Steer how a language model writes while vLLM serves it, request by request."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.version import __version__ as __version__

if TYPE_CHECKING:
    from vllm_steer import hf
    from vllm_steer.config import SteerConfig
    from vllm_steer.files import load_steer, save_steer
    from vllm_steer.serving.runtime.offline import load_steer_into, steers_of, unload_steer_from
    from vllm_steer.steers import (
        ConditionSteer,
        DeltaSteer,
        LMSteer,
        LowRankSteer,
        SAESteer,
        Steer,
        VectorSteer,
    )

__all__ = [
    "ConditionSteer",
    "DeltaSteer",
    "LMSteer",
    "LowRankSteer",
    "SAESteer",
    "Steer",
    "SteerConfig",
    "SteerError",
    "SteerRequestError",
    "VectorSteer",
    "hf",
    "load_steer",
    "load_steer_into",
    "save_steer",
    "steers_of",
    "unload_steer_from",
]

_MODULES = {
    "SteerConfig": "vllm_steer.config",
    "load_steer": "vllm_steer.files",
    "save_steer": "vllm_steer.files",
    **dict.fromkeys(
        ("load_steer_into", "steers_of", "unload_steer_from"), "vllm_steer.serving.runtime.offline"
    ),
    **dict.fromkeys(
        (
            *("ConditionSteer", "DeltaSteer", "LMSteer", "LowRankSteer", "SAESteer"),
            *("Steer", "VectorSteer"),
        ),
        "vllm_steer.steers",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch takes two seconds, ``--help`` should
    not.
    """
    if name in ("config", "files", "hf", "steers"):
        return import_module(f"vllm_steer.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
