"""The map of a step's tokens to what they take, made once per step for all layers of a site."""

from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.floors import token_map_bytes
from benchmarks.operations.measure import Bench, Case, Tensors, Work, ours, sets_for
from vllm_steer.kernels.dispatch import guidance_backend
from vllm_steer.kernels.guidance import TokenMap, TokenRules, reference

FORMS = ("triton", "torch")
STEPS = 64
FAR = torch.iinfo(torch.int64).max
Step = tuple[TokenRules, torch.Tensor, torch.Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class MapCase(Case):
    """``rows`` tokens in all, as many for each of the ``requests``; all of these take ``doses``."""

    case: str
    rows: int
    requests: int
    layers: int
    doses: int
    section = "map"

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes of one map."""
        size = {"requests": self.requests, "layers": self.layers, "doses": self.doses}
        return token_map_bytes(tokens=self.rows, **size)

    def sets(self, bench: Bench) -> list[Step]:
        """The same step, in other memory."""
        count = sets_for(self.floor_bytes(0), bench.reach)
        return [self.step(bench.device) for _ in range(count)]

    def step(self, device: torch.device) -> Step:
        """The rules, each request's first token, and each token's position: from 0 on in a prefill,
        that of the fourth token of the generation in a decode step.

        Rules of three kinds in turn: a vector for all tokens, one for the generation only, a delta
        of ``STEPS`` steps that falls to zero. Requests have prompts of 32 tokens.
        """
        doses, requests = torch.arange(self.doses)[:, None], torch.arange(self.requests)
        kind = (doses + requests) % 3
        delta = kind == 2
        on_layer = torch.arange(self.layers)[:, None, None] % 2 == kind % 2
        rules = {
            "direction_start": 1 + kind,
            "direction_stride": delta.long(),
            "step0_position": torch.where(delta, 31, 0),
            "begin": torch.tensor([0, 32, 31])[kind],
            "end": torch.where(delta, 31 + STEPS, FAR),
            "strength": 0.5 + kind.float(),
            "slope": torch.where(delta, 1 / STEPS, 0.0),
            "pool_offset": torch.full_like(kind, -1),
            "layers": on_layer.float(),
            "strength_pool": torch.zeros(1),
        }
        each = self.rows // self.requests
        starts = torch.arange(0, self.rows + 1, each, dtype=torch.int32, device=device)
        positions = torch.arange(self.rows, device=device) % each + (35 if each == 1 else 0)
        return TokenRules(**{key: on.to(device) for key, on in rules.items()}), starts, positions

    def empty_map(self, device: torch.device) -> TokenMap:
        """Room for the results."""
        return TokenMap(
            torch.zeros(self.doses, self.rows, dtype=torch.int32, device=device),
            torch.zeros(self.layers, self.doses, self.rows, device=device),
        )

    def work(self, form: str, step: Step) -> Work:
        """Ours."""
        device = step[-1].device
        module, out = ours(guidance_backend, form, device), self.empty_map(device)

        def call() -> Tensors:
            module.map_tokens(*step, out)
            return out.directions, out.strengths

        def check(results: Tensors) -> float:
            directions, strengths = (result.cpu() for result in results)
            wanted = written_out(self)
            assert torch.equal(directions, wanted.directions), "another direction than it takes"
            error = float((strengths - wanted.strengths).abs().max())
            assert error <= 1e-5, f"a strength is wrong by {error:.2g}"
            return error

        def poison() -> None:
            out.directions.fill_(-1)
            out.strengths.fill_(float("nan"))

        return Work(call, check, poison)


@cache
def written_out(case: MapCase) -> TokenMap:
    """The map of a case's step by the kernels' written-out reference, token by token."""
    out = case.empty_map(CPU)
    reference.map_tokens(*case.step(CPU), out)
    return out
