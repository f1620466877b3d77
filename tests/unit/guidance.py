"""Small vectors and deltas, and the plan that an engine would make of them."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.config import Limits
from vllm_steer.plan import PlannedSteer, SteerPlan
from vllm_steer.steers.content import content_digest

WIDTH = 5


def vector(layers: tuple[int, ...], *, seed: int = 0, width: int = WIDTH, **fields: Any) -> Any:
    """A random vector steer."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(layers), width, generator=generator)
    return VectorSteer(vectors=vectors, layers=layers, **fields)


def delta(
    steps: int, layers: tuple[int, ...], *, seed: int = 0, width: int = WIDTH, **fields: Any
) -> Any:
    """A random delta steer."""
    generator = torch.Generator().manual_seed(100 + seed)
    values = torch.randn(steps, len(layers), width, generator=generator)
    return DeltaSteer(delta=values, layers=layers, **fields)


def head(*, width: int = WIDTH, **fields: Any) -> LMSteer:
    """An LM-Steer."""
    return LMSteer(
        variant="add", add=torch.ones(1, width), epsilon=1.0, hidden_size=width, **fields
    )


def planned(name: str, steer: Steer) -> PlannedSteer:
    """The entry of a steer in a plan."""
    return PlannedSteer(
        path=Path(f"/steers/{name}.safetensors"),
        overrides={},
        kind=steer.kind,
        site=steer.site,
        hidden_size=steer.hidden_size,
        layers=steer.layers,
        schedule=steer.schedule,
        steps=steer.steps if isinstance(steer, DeltaSteer) else None,
        default_strength=1.0 if steer.default_strength is None else steer.default_strength,
        content=content_digest(steer),
    )


def plan_for(
    steers: Mapping[str, Steer],
    *,
    presets: Mapping[str, Any] | None = None,
    default: str = "none",
    **limits: Any,
) -> SteerPlan:
    """A plan for steers whose files are not read again."""
    return SteerPlan(
        version="0",
        kernels="auto",
        steers={name: planned(name, steer) for name, steer in steers.items()},
        presets=dict(presets or {}),
        default=default,
        limits=Limits(**limits),
    )


def params(steer: Any = None) -> Any:
    """The part of sampling parameters that carries a steer."""
    return SimpleNamespace(extra_args=None if steer is None else {"steer": steer})
