"""The divergence behind dynamic strengths: from logits to a KL per dose."""

from dataclasses import dataclass

import torch

from benchmarks.operations.measure import (
    MeasurementSetup,
    Operation,
    OperationCase,
    Tensors,
    dispatched,
    sets_for,
)
from vllm_steer.kernels.dispatch import divergence_backend
from vllm_steer.kernels.divergence import torch_sort

FORMS = ("triton", "torch")
TOP_P = 0.9
SPREAD = 4.0
"""Deviation of the logits, in nats: some 550 of 128,256 tokens make 0.9."""


@dataclass(frozen=True)
class DivergenceCase(OperationCase):
    """``doses`` doses, each with its own base and probe, over ``width`` tokens."""

    doses: int
    width: int
    section = "divergence"
    case = "dynamic"

    def floor_bytes(self, itemsize: int) -> int:
        """Bytes of base and probe of every dose once, and a KL in float32 and a size per dose."""
        return self.doses * (2 * self.width * itemsize + 12)

    def sets(self, bench: MeasurementSetup) -> list[torch.Tensor]:
        """Random logits: the bases, then the probes."""
        generator = torch.Generator(bench.device).manual_seed(0)
        size = (2 * self.doses, self.width)
        return [
            torch.randn(size, generator=generator, device=bench.device).mul_(SPREAD).to(bench.dtype)
            for _ in range(sets_for(self.floor_bytes(bench.dtype.itemsize), bench.reach))
        ]

    def work(self, form: str, logits: torch.Tensor) -> Operation:
        """The operation of vllm-steer."""
        module = dispatched(divergence_backend, form, logits.device)
        doses = torch.arange(self.doses, device=logits.device)
        top_p = torch.full((self.doses,), TOP_P, device=logits.device)

        def call() -> Tensors:
            return module.divergence(logits, doses, doses + self.doses, top_p)

        def check(results: Tensors) -> float:
            """Check two doses against a sort in float64."""
            two_doses = doses[:2]
            rows = logits[torch.cat([two_doses, two_doses + self.doses])].double()
            expected, _ = torch_sort.divergence(
                rows, two_doses, two_doses + len(two_doses), float(top_p[0])
            )
            actual = results[0][: len(two_doses)].double()
            error = float(((actual - expected).abs() / expected.abs().clamp(min=1e-3)).max())
            assert error <= 1e-3, f"a KL is wrong by {error:.2g}"
            return error

        return Operation(call, check)
