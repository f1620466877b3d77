"""Equal first, then timed: what a peer computes is what vllm-steer computes."""

import math

import torch

from benchmarks.decode import Engine
from benchmarks.engines import greedy
from benchmarks.equality import CHECK_STEPS
from benchmarks.peers.hf_engine import HuggingFaceEngine
from benchmarks.peers.job import Job

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of a token's log probability


def check_tokens(
    job: Job, ours: Engine, peer: HuggingFaceEngine, rows: int, steer: str | None
) -> None:
    """The peer finds vLLM's tokens as likely as vLLM does, step by step through its own KV cache.

    It is made to follow them: in bfloat16 two that are nearly as likely may swap.
    """
    asked, vocab_size = [steer] * rows, job.dimensions.vocab_size
    leg = ours.leg(asked, CHECK_STEPS, vocab_size, logprobs=True)
    read = peer.leg(asked, CHECK_STEPS, vocab_size, logprobs=True, forced=leg.tokens)
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
