"""Activation guidance of one layer: additions and rotations of a step's tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.floors import guidance_bytes
from benchmarks.operations.measure import (
    Bench,
    Skipped,
    Tensors,
    Work,
    ours,
    relative_error,
    sets_for,
)
from vllm_steer.kernels.dispatch import guidance_form
from vllm_steer.kernels.guidance import Directions, TokenMap

DIRECTIONS = 8
LAYERS = 32
FORMS = ("triton", "torch", "plain_add")


@dataclass(frozen=True)
class GuidanceCase:
    """All tokens take ``doses`` directions each. Rotations are of the sum of hidden state and
    residual, as in Llama; an addition needs no residual.
    """

    mode: Literal["add", "rotate"]
    rows: int
    width: int
    doses: int
    flops = 0

    @property
    def columns(self) -> dict[str, Any]:
        """What names it."""
        return {"section": "guidance", "case": self.mode, **vars(self)}

    @property
    def residual(self) -> bool:
        """Whether the residual is read too."""
        return self.mode == "rotate"

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes of one layer."""
        return guidance_bytes(
            self.width,
            tokens=self.rows,
            doses=self.doses,
            directions=min(DIRECTIONS, self.rows + self.doses - 1),
            residual=self.residual,
            itemsize=itemsize,
        )

    def sets(self, bench: Bench) -> list["Inputs"]:
        """Streams of different layers."""
        generator = torch.Generator(bench.device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=bench.device, generator=generator)

        vectors, turns = random(LAYERS, DIRECTIONS + 1, self.width), None
        vectors[:, 0] = 0
        if self.mode == "rotate":
            vectors[:, 1:] /= vectors[:, 1:].norm(dim=2, keepdim=True)
            turns = torch.ones(DIRECTIONS + 1, device=bench.device)
            turns[0] = 0
        directions, token_map = Directions(vectors, turns), self._token_map(bench.device)
        streams = 1 + self.residual
        set_bytes = streams * self.rows * self.width * bench.dtype.itemsize
        sets = []
        for nth in range(sets_for(set_bytes, bench.reach)):
            stream = random(streams, self.rows, self.width).to(bench.dtype)
            residual = stream[1] if self.residual else None
            sets.append(Inputs(self, stream[0], residual, directions, token_map, nth % LAYERS))
        return sets

    def _token_map(self, device: torch.device) -> TokenMap:
        """Directions in turn, at a few strengths; a turn is by about half the norm."""
        unit = self.width**0.5 / 2 if self.mode == "rotate" else 1.0
        token, dose = torch.arange(self.rows), torch.arange(self.doses)[:, None]
        strengths = (0.5 + (token + 3 * dose) % 7 / 8) * unit
        return TokenMap(
            (1 + (token + dose) % DIRECTIONS).to(device, torch.int32),
            strengths.expand(LAYERS, -1, -1).contiguous().to(device),
        )

    def work(self, form: str, inputs: "Inputs") -> Work:
        """Ours, or a plain sum."""
        inputs = _plain(inputs) if form == "plain_add" else inputs
        hidden = inputs.before.clone()
        steer = _plain_add(inputs) if form == "plain_add" else _ours(form, inputs)

        def run() -> Tensors:
            steer(hidden)
            return (hidden,)

        return Work(run, partial(_check, inputs), lambda: hidden.copy_(inputs.before))


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set: a layer's stream, and what each of its tokens takes there."""

    case: GuidanceCase
    before: torch.Tensor
    residual: torch.Tensor | None
    directions: Directions
    token_map: TokenMap
    layer: int


def _ours(form: str, inputs: Inputs) -> Callable[[torch.Tensor], None]:
    module = ours(guidance_form, form, inputs.before.device)
    rest = (inputs.directions, inputs.layer, inputs.token_map, inputs.case.doses)
    return lambda hidden: module.steer_tokens_(hidden, inputs.residual, *rest)


def _plain(inputs: Inputs) -> Inputs:
    """The same with one direction and one strength for all tokens: all that a plain sum knows."""
    given = inputs.token_map
    if (inputs.case.mode, inputs.case.doses) != ("add", 1):
        raise Skipped("a plain sum adds one vector at one strength to all tokens")
    even = TokenMap(torch.ones_like(given.directions), torch.ones_like(given.strengths))
    return replace(inputs, token_map=even)


def _plain_add(inputs: Inputs) -> Callable[[torch.Tensor], None]:
    """What a forward hook without a batch in mind does: one vector in the model's dtype."""
    vector = inputs.directions.vectors[inputs.layer, 1].to(inputs.before.dtype)
    return lambda hidden: hidden.add_(vector)


def _check(inputs: Inputs, results: Tensors) -> float:
    touched = (inputs.token_map.strengths[inputs.layer] != 0).any(0)
    return relative_error(results[0], exact(inputs), inputs.before, touched)


def exact(inputs: Inputs) -> torch.Tensor:
    """The result in float64: ``x + change``, at the norm of ``x`` where it turns."""
    layer, token_map = inputs.layer, inputs.token_map
    vectors = inputs.directions.vectors[layer].double()
    change = torch.zeros(inputs.before.shape, dtype=torch.float64, device=vectors.device)
    for which, strengths in zip(token_map.directions, token_map.strengths[layer], strict=True):
        change += vectors[which] * strengths.double()[:, None]
    kept = 0.0 if inputs.residual is None else inputs.residual.double()
    x = inputs.before.double() + kept
    steered = x + change
    if inputs.case.mode == "rotate":
        steered *= x.norm(dim=1, keepdim=True) / steered.norm(dim=1, keepdim=True)
    return steered - kept
