"""Activation guidance of one layer: additions and rotations of a step's tokens."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from benchmarks.operations.measure import (
    MeasurementSetup,
    Operation,
    OperationCase,
    Tensors,
    dispatched,
    relative_error,
    sets_for,
)
from vllm_steer.kernels.dispatch import guidance_backend
from vllm_steer.kernels.guidance import Directions, TokenMap

DIRECTIONS = 8
LAYERS = 32
FORMS = ("triton", "torch")


@dataclass(frozen=True)
class GuidanceCase(OperationCase):
    """All tokens take ``doses`` directions each. Rotations are of the sum of hidden state and
    residual, as in Llama; an addition needs no residual.
    """

    case: Literal["add", "rotate"]
    rows: int
    width: int
    doses: int
    section = "guidance"

    @property
    def residual(self) -> bool:
        """Whether the residual is read too."""
        return self.case == "rotate"

    def floor_bytes(self, itemsize: int) -> int:
        """Bytes of one layer: rows in and out (the residual in), the used directions in float32,
        and 8 bytes of the map per dose.
        """
        rows = self.rows * self.width * itemsize * (2 + self.residual)
        directions = min(DIRECTIONS, self.rows + self.doses - 1)
        return rows + 4 * directions * self.width + 8 * self.rows * self.doses

    def sets(self, bench: MeasurementSetup) -> list["GuidanceInputs"]:
        """Residual streams of different layers."""
        generator = torch.Generator(bench.device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=bench.device, generator=generator)

        vectors, is_rotation = random(LAYERS, DIRECTIONS + 1, self.width), None
        vectors[:, 0] = 0
        if self.case == "rotate":
            vectors[:, 1:] /= vectors[:, 1:].norm(dim=2, keepdim=True)
            is_rotation = torch.ones(DIRECTIONS + 1, device=bench.device)
            is_rotation[0] = 0
        directions, token_map = Directions(vectors, is_rotation), self._token_map(bench.device)
        streams = 1 + self.residual
        set_bytes = streams * self.rows * self.width * bench.dtype.itemsize
        sets = []
        for nth in range(sets_for(set_bytes, bench.reach)):
            stream = random(streams, self.rows, self.width).to(bench.dtype)
            residual = stream[1] if self.residual else None
            sets.append(
                GuidanceInputs(self, stream[0], residual, directions, token_map, nth % LAYERS)
            )
        return sets

    def _token_map(self, device: torch.device) -> TokenMap:
        """Directions round-robin, at a few strengths; a rotation is by about half the norm."""
        unit = self.width**0.5 / 2 if self.case == "rotate" else 1.0
        token, dose = torch.arange(self.rows), torch.arange(self.doses)[:, None]
        strengths = (0.5 + (token + 3 * dose) % 7 / 8) * unit
        return TokenMap(
            (1 + (token + dose) % DIRECTIONS).to(device, torch.int32),
            strengths.expand(LAYERS, -1, -1).contiguous().to(device),
        )

    def work(self, form: str, inputs: "GuidanceInputs") -> Operation:
        """The operation of vllm-steer, on its own residual stream, which it changes in place."""
        hidden, touched = inputs.before.clone(), inputs.token_map.directions[0] > 0
        module = dispatched(guidance_backend, form, hidden.device)
        rest = (inputs.directions, inputs.layer, inputs.token_map, self.doses)

        def run() -> Tensors:
            module.steer_tokens_(hidden, inputs.residual, *rest)
            return (hidden,)

        def check(results: Tensors) -> float:
            return relative_error(results[0], inputs.exact, inputs.before, touched)

        return Operation(run, check, lambda: hidden.copy_(inputs.before))


@dataclass(frozen=True, eq=False)
class GuidanceInputs:
    """One set of inputs: a layer's residual stream, and the doses of each token."""

    case: GuidanceCase
    before: torch.Tensor
    residual: torch.Tensor | None
    directions: Directions
    token_map: TokenMap
    layer: int

    @cached_property
    def exact(self) -> torch.Tensor:
        """The result in float64: ``x + change``, rescaled to the norm of ``x`` where it rotates."""
        vectors = self.directions.vectors[self.layer].double()
        change = torch.zeros(self.before.shape, dtype=torch.float64, device=vectors.device)
        strengths = self.token_map.strengths[self.layer].double()
        for direction_rows, strength in zip(self.token_map.directions, strengths, strict=True):
            change += vectors[direction_rows] * strength[:, None]
        residual = 0.0 if self.residual is None else self.residual.double()
        x = self.before.double() + residual
        steered = x + change
        if self.case.case == "rotate":
            steered *= x.norm(dim=1, keepdim=True) / steered.norm(dim=1, keepdim=True)
        return steered - residual
