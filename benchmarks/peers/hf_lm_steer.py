"""LM-Steer on Hugging Face, one strength for the whole batch.

The model's LM head is replaced by one that transforms its input ``c`` first (Han et al. 2024,
section 3), in the model's dtype and uncompiled:

    logits = (c + epsilon * sum_s v_s (c P1_s) P2_s^T) E^T        logits = c E^T  where all v_s = 0

`hf-lm-steer` computes the products as the authors' code does, one for each row and steer, so torch
copies the factors once per row: the setting of the paper's 1.24. `hf-lm-steer-plain` computes one
product per steer, the direct implementation of the equation. vllm-steer is measured next to both
with the same weights and the same steer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.decode import BenchmarkEngine
from benchmarks.dummy_model import STRENGTH
from benchmarks.equality import CHECK_STEPS, check_operation
from benchmarks.peers.hf_engine import HuggingFaceEngine
from benchmarks.peers.job import TOLERANCE, PeerJob

STEER_STRENGTH = f"s0:{STRENGTH}"
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def change_per_row(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``sum_s v_s (x P1_s) P2_s^T`` with a product for each row and steer.

    Shapes: ``x [batch, tokens, hidden_size]``, ``first`` and ``second [S, hidden_size, rank]``,
    ``values [1, S]``.
    """
    repeated = x.unsqueeze(1).expand(-1, len(first), -1, -1)
    inner = torch.matmul(repeated, first) * values.unsqueeze(-1).unsqueeze(-1)
    return torch.matmul(inner, second.mT).sum(dim=1)


def change_per_steer(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The same with one product for each steer."""
    pairs = zip(values[0], first, second, strict=True)
    return sum(value * (x @ p1) @ p2.mT for value, p1, p2 in pairs)


WAYS: dict[str, Change] = {
    "hf-lm-steer": change_per_row,
    "hf-lm-steer-plain": change_per_steer,
}


class HuggingFaceSteeredHead(nn.Module):
    """An LM head with LM-Steers at its input, computed in one of the ``WAYS``."""

    def __init__(self, head: nn.Linear, steer: Any) -> None:
        super().__init__()
        self.head = head
        self.epsilon = steer.epsilon
        self.projector1 = steer.projector1.to(head.weight)
        self.projector2 = steer.projector2.to(head.weight)
        self.change: Change = change_per_row
        self.set_values(*[0.0] * steer.columns)

    def set_values(self, *values: float) -> None:
        """Set one value per steer, for all later rows."""
        self.values = torch.tensor([values]).to(self.head.weight)
        self.active = any(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ``x [batch, tokens, hidden_size]``."""
        if self.active:
            x = x + self.epsilon * self.change(x, self.projector1, self.projector2, self.values)
        return self.head(x)


def load(job: PeerJob) -> tuple[HuggingFaceEngine, HuggingFaceSteeredHead]:
    """The engine and its head."""
    from transformers import AutoModelForCausalLM

    from vllm_steer import load_steer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype).to(device).eval()
    head = HuggingFaceSteeredHead(
        model.get_output_embeddings(), load_steer(job.steers / "s0.safetensors")
    )
    model.set_output_embeddings(head)
    return HuggingFaceEngine(model, lambda steer: head.set_values(STRENGTH if steer else 0)), head


def check_tokens(
    job: PeerJob, ours: BenchmarkEngine, peer: HuggingFaceEngine, rows: int, steer: str | None
) -> None:
    """Check that the peer gives vLLM's tokens the same likelihood, step by step with its own KV
    cache. The peer is forced to these tokens: in bfloat16, two nearly equal ones may swap.
    """
    steers, vocab_size = [steer] * rows, job.dimensions.vocab_size
    leg = ours.leg(steers, CHECK_STEPS, vocab_size, logprobs=True)
    peer_leg = peer.leg(steers, CHECK_STEPS, vocab_size, logprobs=True, forced=leg.tokens)
    allowed = TOLERANCE[job.dtype] * len(leg.tokens[0])
    for row, (actual, expected) in enumerate(zip(peer_leg.logprobs, leg.logprobs, strict=True)):
        assert math.isclose(actual, expected, abs_tol=allowed), (
            f"row {row}: {actual}, not {expected}"
        )


def measure(job: PeerJob) -> list[dict[str, Any]]:
    """Measure vllm-steer and both Hugging Face variants at each batch size."""
    ours = (job.engine(["s0"]), STEER_STRENGTH)
    peer, head = load(job)
    size = {"rank": job.rank, "rows": max(job.rows)}
    check_operation("steered", job.dimensions, job.torch_dtype, **size)
    lines = []
    for rows in job.rows:
        check_tokens(job, ours[0], peer, rows, None)
        lines.append(job.alone("ours lm-steer", ours, rows, job.rank))
        for name, head.change in WAYS.items():
            check_tokens(job, ours[0], peer, rows, STEER_STRENGTH)
            lines.append(job.beside(name, ours, (peer, STEER_STRENGTH), rows, job.rank))
    return lines
