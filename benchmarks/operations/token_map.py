"""The map of a step's tokens to what they take, made once per step for all layers of a site."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.floors import token_map_bytes
from benchmarks.operations.measure import Bench, Tensors, Work, ours, sets_for
from vllm_steer.kernels.dispatch import guidance_form
from vllm_steer.kernels.guidance import Rules, TokenMap

FORMS = ("triton", "torch")
STEPS = 64
FAR = np.iinfo(np.int64).max
Step = tuple[Rules, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MapCase:
    """``rows`` tokens in all, as many for each of the ``requests``; all of these take ``doses``."""

    case: str
    rows: int
    requests: int
    layers: int
    doses: int
    flops = 0

    @property
    def columns(self) -> dict[str, Any]:
        """What names it."""
        return {"section": "map", **vars(self)}

    @property
    def each(self) -> int:
        """Tokens of each request."""
        return self.rows // self.requests

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes of one map."""
        size = {"requests": self.requests, "layers": self.layers, "doses": self.doses}
        return token_map_bytes(tokens=self.rows, **size)

    def host_rules(self) -> dict[str, np.ndarray]:
        """Rules of three kinds in turn: a vector for all tokens, one for the generation only, a
        delta of ``STEPS`` steps that falls to zero. Requests have prompts of 32 tokens.
        """
        kind = np.add.outer(np.arange(self.doses), np.arange(self.requests)) % 3
        delta = kind == 2
        on_layer = np.arange(self.layers)[:, None, None] % 2 == kind % 2
        return {
            "start": 1 + kind,
            "stride": delta.astype(np.int64),
            "origin": np.where(delta, 31, 0),
            "first": np.choose(kind, [0, 32, 31]),
            "last": np.where(delta, 31 + STEPS, FAR),
            "strength": (0.5 + kind).astype(np.float32),
            "slope": np.where(delta, 1 / STEPS, 0).astype(np.float32),
            "table": np.full(kind.shape, -1),
            "layers": on_layer.astype(np.float32),
        }

    def sets(self, bench: Bench) -> list[Step]:
        """The same step, in other memory."""
        count = sets_for(self.floor_bytes(0), bench.reach)
        return [self.step(bench.device) for _ in range(count)]

    def step(self, device: torch.device) -> Step:
        """The rules, each request's first token, and each token's position: from 0 on in a prefill,
        that of the fourth token of the generation in a decode step.
        """
        rules = {
            key: torch.from_numpy(array).to(device) for key, array in self.host_rules().items()
        }
        starts = torch.arange(0, self.rows + 1, self.each, dtype=torch.int32, device=device)
        before = 35 if self.each == 1 else 0
        positions = torch.arange(self.rows, device=device) % self.each + before
        return Rules(**rules, history=torch.zeros(1, device=device)), starts, positions

    def work(self, form: str, step: Step) -> Work:
        """Ours."""
        rules, starts, positions = step
        device = positions.device
        module = ours(guidance_form, form, device)
        out = TokenMap(
            torch.zeros(self.doses, self.rows, dtype=torch.int32, device=device),
            torch.zeros(self.layers, self.doses, self.rows, device=device),
        )

        def call() -> Tensors:
            module.map_tokens(rules, starts, positions, out)
            return out.directions, out.strengths

        def check(results: Tensors) -> float:
            directions, strengths = (result.cpu().numpy() for result in results)
            wanted = self.exact(positions.cpu().numpy())
            assert np.array_equal(directions, wanted[0]), "a token was mapped to another direction"
            error = float(np.abs(strengths - wanted[1]).max())
            assert error <= 1e-5, f"a strength is wrong by {error:.2g}"
            return error

        def poison() -> None:
            out.directions.fill_(-1)
            out.strengths.fill_(float("nan"))

        return Work(call, check, poison)

    def exact(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Directions and strengths by the equations of ``Rules``, in float64."""
        rules = {key: array.repeat(self.each, axis=-1) for key, array in self.host_rules().items()}
        acts = (rules["first"] <= positions) & (positions < rules["last"])
        step = np.where(acts, positions - rules["origin"], 0)
        strength = np.where(acts, rules["strength"] * (1 - rules["slope"].astype(float) * step), 0)
        directions = np.where(acts, rules["start"] + rules["stride"] * step, 0)
        return directions, rules["layers"] * strength
