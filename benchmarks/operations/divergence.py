"""The divergence behind dynamic strengths: from logits to a KL per dose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from operations.floors import divergence_bytes
from operations.lm_steer_forms import no_triton
from operations.measure import Bench, Skipped, Tensors, Work, form_line, sets_for
from vllm_steer.kernels.dispatch import KernelError, divergence_form
from vllm_steer.kernels.divergence import by_sort

FORMS = ("triton", "torch")
TOP_P = 0.9
SPREAD = 4.0
"""Deviation of the logits, in nats: some 550 of 128,256 tokens make 0.9."""


@dataclass(frozen=True)
class DivergenceCase:
    """So many ``doses``, each with a base and a probe of its own, over ``vocab`` tokens."""

    doses: int
    vocab: int

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes of one call."""
        return divergence_bytes(self.doses, self.vocab, itemsize=itemsize)


def run(
    cases: Sequence[DivergenceCase], bench: Bench, forms: Sequence[str] = FORMS
) -> Iterator[dict[str, Any]]:
    """A line per case and form."""
    for case in cases:
        floor = case.floor_bytes(bench.dtype.itemsize)
        for form in forms:
            works = partial(_works, form, case, bench)
            found = form_line(bench, works, floor_bytes=floor, flops=0, matrix=False)
            columns = {"section": "divergence", "case": "dynamic", "rows": 2 * case.doses}
            yield columns | {"doses": case.doses, "width": case.vocab, "form": form} | found


def _works(form: str, case: DivergenceCase, bench: Bench) -> list[Work]:
    count = sets_for(case.floor_bytes(bench.dtype.itemsize), bench.reach)
    return [_work(form, case, bench, seed) for seed in range(count)]


def _work(form: str, case: DivergenceCase, bench: Bench, seed: int) -> Work:
    if form == "triton" and bench.device.type != "cuda":
        raise Skipped(no_triton(bench.device))
    try:
        module = divergence_form(form, bench.device)
    except KernelError as error:
        raise Skipped(str(error)) from None
    generator = torch.Generator(bench.device).manual_seed(seed)
    size = (2 * case.doses, case.vocab)
    logits = torch.randn(size, generator=generator, device=bench.device).mul_(SPREAD)
    logits = logits.to(bench.dtype)
    doses = torch.arange(case.doses, device=bench.device)
    top_p = torch.full((case.doses,), TOP_P, device=bench.device)

    def call() -> Tensors:
        return module.divergence(logits, doses, doses + case.doses, top_p)

    def check(results: Tensors) -> float:
        """A few doses against a sort in float64."""
        few = torch.arange(min(2, case.doses))
        rows = torch.cat([few, few + case.doses]).to(bench.device)
        few = few.to(bench.device)
        wanted, _ = by_sort.divergence(logits[rows].double(), few, few + len(few), float(top_p[0]))
        found = results[0][: len(few)].double()
        error = float(((found - wanted).abs() / wanted.abs().clamp(min=1e-3)).max())
        assert error <= 1e-3, f"a KL is wrong by {error:.2g}"
        return error

    return Work(call, check)
