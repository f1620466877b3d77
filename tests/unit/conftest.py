"""Small steers, and the plan that an engine would make of them, for all unit tests."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_steer import LMSteer
from vllm_steer.cli import libraries
from vllm_steer.config import Limits
from vllm_steer.plan import PlannedSteer, SteerPlan

HIDDEN = 6
VOCAB = 11

MakeSteer = Callable[..., LMSteer]
MakePlan = Callable[..., SteerPlan]


@pytest.fixture(autouse=True)
def _keep_library_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test runs in this process hides no messages from the tests after it."""
    for name in libraries._QUIET:
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)
    level = logging.getLogger("vllm").level
    yield
    logging.getLogger("vllm").setLevel(level)


@pytest.fixture
def make_steer() -> MakeSteer:
    """Random steers of any variant; keywords override the fields of ``LMSteer``."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def make(variant: str = "multiply", *, columns: int = 1, rank: int = 2, **fields: Any) -> Any:
        hidden_size = fields.setdefault("hidden_size", HIDDEN)
        fields.setdefault("epsilon", 0.25)
        if variant == "multiply":
            fields.setdefault("projector1", normal(columns, hidden_size, rank))
            fields.setdefault("projector2", normal(columns, hidden_size, rank))
        if variant == "add":
            fields.setdefault("add", normal(columns, hidden_size))
        if variant == "offset":
            fields.setdefault("offset", normal(columns, VOCAB))
        return LMSteer(variant=variant, **fields)

    return make


@pytest.fixture
def make_plan() -> MakePlan:
    """A plan for steers without files, to resolve requests with."""

    def make(
        steers: dict[str, float],
        *,
        presets: dict[str, dict[str, float]] | None = None,
        default: str = "none",
        **limits: Any,
    ) -> SteerPlan:
        return SteerPlan(
            version="0",
            kernels="auto",
            steers={name: planned(name, strength) for name, strength in steers.items()},
            presets=presets or {},
            default=default,
            limits=Limits(**limits),
        )

    return make


def planned(name: str, default_strength: float) -> PlannedSteer:
    return PlannedSteer(
        path=Path(f"/steers/{name}.safetensors"),
        overrides={},
        kind="lm_steer",
        site="head",
        hidden_size=HIDDEN,
        default_strength=default_strength,
        content=name,
    )


@dataclasses.dataclass
class SteeringVector:
    """The class of the library steering-vectors, under its name there."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


@pytest.fixture
def steering_vectors(monkeypatch: pytest.MonkeyPatch) -> type[SteeringVector]:
    """A stand-in for the installed library steering-vectors, for pickling."""
    name = "steering_vectors.steering_vector"
    module: Any = ModuleType(name)
    module.SteeringVector = SteeringVector
    monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(SteeringVector, "__module__", name)
    return SteeringVector
