"""Activation guidance of one layer: additions and rotations of some of a step's tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from operations.floors import guidance_bytes, guidance_flops
from operations.lm_steer_cases import steered_places
from operations.lm_steer_forms import no_triton
from operations.measure import (
    Bench,
    Skipped,
    Tensors,
    Work,
    form_line,
    relative_error,
    sets_for,
)
from vllm_steer.kernels.dispatch import KernelError, guidance_form
from vllm_steer.kernels.guidance import Directions, TokenMap

DIRECTIONS = 8
LAYERS = 32
FORMS = ("triton", "torch", "plain_add")


@dataclass(frozen=True)
class GuidanceCase:
    """``share`` of the tokens take ``doses`` directions each. Rotations are of the sum of hidden
    state and ``residual``, as in Llama; an addition needs no residual.
    """

    name: str
    tokens: int
    width: int
    mode: Literal["add", "rotate"]
    doses: int = 1
    share: float = 1.0

    @property
    def residual(self) -> bool:
        """Whether the residual is read too."""
        return self.mode == "rotate"

    @property
    def steered(self) -> int:
        """Tokens that take something."""
        return len(steered_places(self.tokens, self.share))

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes of one layer."""
        return guidance_bytes(
            self.width,
            steered=self.steered,
            doses=self.doses,
            directions=min(DIRECTIONS, self.steered + self.doses - 1) if self.steered else 0,
            residual=self.residual,
            itemsize=itemsize,
        )

    @property
    def flops(self) -> int:
        """Operations of one layer, on ordinary cores."""
        rotate = self.mode == "rotate"
        return guidance_flops(self.width, steered=self.steered, doses=self.doses, rotate=rotate)


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set: a layer's stream, and what each of its tokens takes there."""

    case: GuidanceCase
    before: torch.Tensor
    residual: torch.Tensor | None
    directions: Directions
    token_map: TokenMap
    layer: int


def guidance_cases(
    tokens: Sequence[int], width: int, doses: Sequence[int], shared: Sequence[int]
) -> Iterator[GuidanceCase]:
    """The grid of tokens and doses, then shares of steered tokens, of ``shared`` in all."""
    for mode in ("add", "rotate"):
        for count in tokens:
            for depth in doses:
                yield GuidanceCase("grid", count, width, mode, depth)
        for count in shared:
            for share in (0.0, 0.01, 0.5):
                yield GuidanceCase("share", count, width, mode, share=share)


def run(
    cases: Sequence[GuidanceCase], bench: Bench, forms: Sequence[str] = FORMS
) -> Iterator[dict[str, Any]]:
    """A line per case and form."""
    for case in cases:
        size = {"floor_bytes": case.floor_bytes(bench.dtype.itemsize), "flops": case.flops}
        sets = [] if bench.out_of_time else _input_sets(case, bench)
        for form in forms:
            found = form_line(bench, partial(_works, form, sets), **size, matrix=False)
            dtype = str(bench.dtype).removeprefix("torch.")
            yield _columns(case) | {"dtype": dtype, "form": form} | found


def _input_sets(case: GuidanceCase, bench: Bench) -> list[Inputs]:
    generator = torch.Generator(bench.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=bench.device, generator=generator)

    vectors, turns = random(LAYERS, DIRECTIONS + 1, case.width), None
    vectors[:, 0] = 0
    if case.mode == "rotate":
        vectors[:, 1:] /= vectors[:, 1:].norm(dim=2, keepdim=True)
        turns = torch.ones(DIRECTIONS + 1, device=bench.device)
        turns[0] = 0
    directions, token_map = Directions(vectors, turns), _token_map(case, bench.device)
    streams = 1 + case.residual
    set_bytes = streams * case.tokens * case.width * bench.dtype.itemsize
    sets = []
    for nth in range(sets_for(set_bytes, bench.reach)):
        stream = random(streams, case.tokens, case.width).to(bench.dtype)
        residual = stream[1] if case.residual else None
        sets.append(Inputs(case, stream[0], residual, directions, token_map, nth % LAYERS))
    return sets


def _token_map(case: GuidanceCase, device: torch.device) -> TokenMap:
    """Tokens take the directions in turn, at a few strengths; a turn is by about half the norm."""
    unit = case.width**0.5 / 2 if case.mode == "rotate" else 1.0
    token, dose = torch.arange(case.tokens), torch.arange(case.doses)[:, None]
    steered = torch.zeros(case.tokens).index_fill_(
        0, torch.tensor(steered_places(case.tokens, case.share), dtype=torch.int64), 1.0
    )
    which = (1 + (token + dose) % DIRECTIONS) * (steered > 0)
    strengths = (0.5 + (token + 3 * dose) % 7 / 8) * unit * steered
    return TokenMap(
        which.to(torch.int32).to(device),
        strengths.expand(LAYERS, -1, -1).contiguous().to(device),
    )


def _works(form: str, sets: Sequence[Inputs]) -> list[Work]:
    return [_work(form, inputs) for inputs in sets]


def _work(form: str, inputs: Inputs) -> Work:
    inputs = _plain(inputs) if form == "plain_add" else inputs
    hidden = inputs.before.clone()
    steer = _plain_add(inputs) if form == "plain_add" else _ours(form, inputs)

    def run() -> Tensors:
        steer(hidden)
        return (hidden,)

    return Work(run, partial(_check, inputs), lambda: hidden.copy_(inputs.before))


def _ours(form: str, inputs: Inputs) -> Callable[[torch.Tensor], None]:
    device, depth = inputs.before.device, inputs.case.doses
    if form == "triton" and device.type != "cuda":
        raise Skipped(no_triton(device))
    try:
        module = guidance_form(form, device)
    except KernelError as error:
        raise Skipped(str(error)) from None
    rest = (inputs.residual, inputs.directions, inputs.layer, inputs.token_map, depth)
    return lambda hidden: module.steer_tokens_(hidden, *rest)


def _plain(inputs: Inputs) -> Inputs:
    """The same with one direction and one strength for all tokens: all that a plain sum knows."""
    case, given = inputs.case, inputs.token_map
    if (case.mode, case.doses, case.share) != ("add", 1, 1.0):
        raise Skipped("a plain sum adds one vector at one strength to all tokens")
    even = TokenMap(torch.ones_like(given.directions), torch.ones_like(given.strengths))
    return replace(inputs, token_map=even)


def _plain_add(inputs: Inputs) -> Callable[[torch.Tensor], None]:
    """What a forward hook without a batch in mind does: one vector in the model's dtype."""
    vector = inputs.directions.vectors[inputs.layer, 1].to(inputs.before.dtype)
    return lambda hidden: hidden.add_(vector)


def _check(inputs: Inputs, results: Tensors) -> float:
    touched = (inputs.token_map.strengths[inputs.layer] != 0).any(0)
    return relative_error(results[0], _exact(inputs), inputs.before, touched)


def _exact(inputs: Inputs) -> torch.Tensor:
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


def _columns(case: GuidanceCase) -> dict[str, Any]:
    return {
        "section": "guidance",
        "case": case.name,
        "mode": case.mode,
        "rows": case.tokens,
        "width": case.width,
        "doses": case.doses,
        "share": case.share,
    }
