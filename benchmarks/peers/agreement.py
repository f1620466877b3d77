"""Equal first, then timed: what a peer computes is what vllm-steer computes."""

import math
from typing import Any

import torch

from benchmarks.decode import Engine
from benchmarks.engines import greedy
from benchmarks.equality import CHECK_STEPS
from benchmarks.peers.hf_engine import HuggingFaceEngine
from benchmarks.peers.job import Job

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of a token's log probability


def check_hidden_states(head: Any, steer: Any, strength: float, dtype: torch.dtype) -> None:
    """A peer's steered head against ``(x + change) E^T`` written out in float64, on random rows."""
    from vllm_steer import hf

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, steer.hidden_size, generator=generator).to(dtype)
    wide = x.double()
    wanted = wide + hf.change(steer, wide, strength)
    found = head.steered(x.to(head.projector1.device)).cpu().double()
    tolerance = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def check_tokens(
    job: Job, ours: Engine, peer: HuggingFaceEngine, rows: int, steer: str | None
) -> None:
    """The peer finds vLLM's tokens as likely as vLLM does, step by step through its own KV cache.

    In float32 it chooses the same tokens, too; in bfloat16 two that are nearly as likely may swap.
    """
    asked = [steer] * rows
    leg = ours.leg(asked, CHECK_STEPS, job.dimensions.vocab_size, logprobs=True)
    if job.dtype == "float32":
        alone = peer.leg(asked, CHECK_STEPS, job.dimensions.vocab_size)
        assert alone.tokens == leg.tokens, "Hugging Face and vLLM chose different tokens"
    with peer.following(leg.tokens):
        read = peer.leg(asked, CHECK_STEPS, job.dimensions.vocab_size, logprobs=True)
    allowed = TOLERANCE[job.dtype] * len(leg.tokens[0])
    for row, (found, wanted) in enumerate(zip(read.logprobs, leg.logprobs, strict=True)):
        assert math.isclose(found, wanted, abs_tol=allowed), f"row {row}: {found}, not {wanted}"


def check_prompt_logprobs(job: Job, ours: Engine, peer: Engine, steer: str) -> None:
    """Two vLLM engines give the tokens of one prompt the same steered log probabilities, and others
    than without the steer."""
    plain, wanted, found = (
        _prompt_logprobs(engine, asked, job.dimensions.vocab_size)
        for engine, asked in ((ours, None), (ours, steer), (peer, steer))
    )
    error, change = ((other - wanted).abs() for other in (found, plain))
    assert error.max() < TOLERANCE[job.dtype], f"log probabilities differ by {error.max()}"
    assert change.mean() > 4 * error.mean(), "the steer changes no more than rounding does"


def _prompt_logprobs(asked: Engine, steer: str | None, vocab_size: int) -> torch.Tensor:
    tokens = [1 + 89 * place % (vocab_size - 2) for place in range(32)]
    asked.add("prompt", tokens, steer, greedy(1, prompt_logprobs=0))
    engine, outputs = asked.llm.llm_engine, []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    pairs = zip(tokens[1:], outputs[-1].prompt_logprobs[1:], strict=True)
    return torch.tensor([found[token].logprob for token, found in pairs])
