"""The map of a step's tokens to what they take, made once per step for all layers of a site."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from operations.floors import token_map_bytes
from operations.lm_steer_forms import no_triton
from operations.measure import Bench, Skipped, Tensors, Work, form_line, sets_for
from vllm_steer.kernels.dispatch import KernelError, guidance_form
from vllm_steer.kernels.guidance import Rules, TokenMap

FORMS = ("triton", "torch")
STEPS = 64
FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class MapCase:
    """``tokens`` in all, as many for each of the ``requests``; all of these take ``doses``."""

    name: str
    tokens: int
    requests: int
    layers: int
    doses: int

    def floor_bytes(self) -> int:
        """The fewest bytes of one map."""
        return token_map_bytes(
            tokens=self.tokens, requests=self.requests, layers=self.layers, doses=self.doses
        )


def run(
    cases: Sequence[MapCase], bench: Bench, forms: Sequence[str] = FORMS
) -> Iterator[dict[str, Any]]:
    """A line per case and form."""
    for case in cases:
        floor = case.floor_bytes()
        for form in forms:
            works = partial(_works, form, case, bench)
            found = form_line(bench, works, floor_bytes=floor, flops=0, matrix=False)
            yield _columns(case) | {"form": form} | found


def host_rules(case: MapCase) -> dict[str, np.ndarray]:
    """Rules of three kinds in turn: a vector for all tokens, one for the generation only, a delta
    of ``STEPS`` steps that falls to zero. Requests have prompts of 32 tokens.
    """
    kind = np.add.outer(np.arange(case.doses), np.arange(case.requests)) % 3
    delta = kind == 2
    first = np.choose(kind, [0, 32, 31])
    rules = {
        "start": 1 + kind,
        "stride": delta.astype(np.int64),
        "origin": np.where(delta, 31, 0),
        "first": first,
        "last": np.where(delta, 31 + STEPS, FAR),
        "strength": (0.5 + kind).astype(np.float32),
        "slope": np.where(delta, 1 / STEPS, 0).astype(np.float32),
        "table": np.full(kind.shape, -1),
    }
    on_layer = np.arange(case.layers)[:, None, None] % 2 == kind % 2
    return rules | {"layers": on_layer.astype(np.float32)}


def step_of(case: MapCase, device: torch.device) -> tuple[Rules, torch.Tensor, torch.Tensor]:
    """The rules, each request's first token, and each token's position."""
    host, each = host_rules(case), _each(case)
    on_device = {name: torch.from_numpy(array).to(device) for name, array in host.items()}
    rules = Rules(**on_device, history=torch.zeros(1, device=device))
    starts = torch.arange(0, case.tokens + 1, each, dtype=torch.int32, device=device)
    return rules, starts, torch.arange(case.tokens, device=device) % each + _before(case)


def exact(case: MapCase, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions and strengths by the equations of ``Rules``, in float64."""
    rules = {name: array.repeat(_each(case), axis=-1) for name, array in host_rules(case).items()}
    acts = (rules["first"] <= positions) & (positions < rules["last"])
    step = np.where(acts, positions - rules["origin"], 0)
    strength = np.where(acts, rules["strength"] * (1 - rules["slope"].astype(float) * step), 0)
    directions = np.where(acts, rules["start"] + rules["stride"] * step, 0)
    return directions, rules["layers"] * strength


def _works(form: str, case: MapCase, bench: Bench) -> list[Work]:
    count = sets_for(case.floor_bytes(), bench.reach)
    return [_work(form, case, bench.device) for _ in range(count)]


def _work(form: str, case: MapCase, device: torch.device) -> Work:
    if form == "triton" and device.type != "cuda":
        raise Skipped(no_triton(device))
    try:
        module = guidance_form(form, device)
    except KernelError as error:
        raise Skipped(str(error)) from None
    rules, starts, positions = step_of(case, device)
    out = TokenMap(
        torch.zeros(case.doses, case.tokens, dtype=torch.int32, device=device),
        torch.zeros(case.layers, case.doses, case.tokens, device=device),
    )

    def call() -> Tensors:
        module.map_tokens(rules, starts, positions, out)
        return out.directions, out.strengths

    def check(results: Tensors) -> float:
        directions, strengths = (result.cpu().numpy() for result in results)
        wanted = exact(case, positions.cpu().numpy())
        assert np.array_equal(directions, wanted[0]), "a token was mapped to another direction"
        error = float(np.abs(strengths - wanted[1]).max())
        assert error <= 1e-5, f"a strength is wrong by {error:.2g}"
        return error

    def poison() -> None:
        out.directions.fill_(-1)
        out.strengths.fill_(float("nan"))

    return Work(call, check, poison)


def _each(case: MapCase) -> int:
    """Tokens of each request."""
    return case.tokens // case.requests


def _before(case: MapCase) -> int:
    """The position of the first token: the fourth of the generation in a decode step."""
    return 35 if _each(case) == 1 else 0


def _columns(case: MapCase) -> dict[str, Any]:
    return {
        "section": "map",
        "case": case.name,
        "rows": case.tokens,
        "requests": case.requests,
        "layers": case.layers,
        "doses": case.doses,
    }
