"""vllm-lens: vectors added by hooks in an eager vLLM.

It needs Python 3.12 and the one vLLM that its release names (0.30.0 for 1.3.0), and it turns
``enforce_eager`` on by itself. Written after the interface of version 1.3.0, in which
``LLM.generate`` carries the vectors to the workers: a leg therefore calls it, and the engine's
steps are timed from within. It has not been run. Where it is not installed the result says
``skipped``.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from decode import LEAD_STEPS, PROMPT_TOKENS, TAIL_STEPS, Leg
from dummy_model import STRENGTH

from peers.alone import compare_alone
from peers.engines import serve, software
from peers.job import Job

NAME = "guided"


class GenerateLeg:
    """``decode.run_leg`` for an engine whose requests have to come through ``LLM.generate``.

    ``extra_args(steer)`` gives a request's sampling arguments; a call may take out what it was
    given, so they are made anew for every request.
    """

    def __init__(self, extra_args: Any) -> None:
        self._extra_args = extra_args

    def __call__(
        self,
        llm: Any,
        steers: Sequence[str | None],
        steps: int,
        vocab_size: int,
        *,
        logprobs: bool = False,
    ) -> Leg:
        """One batch of ``steps`` timed steps."""
        wanted = LEAD_STEPS + steps + TAIL_STEPS
        params = [self._params(wanted, steer, logprobs=logprobs) for steer in steers]
        prompts = [_prompt(row, vocab_size) for row in range(len(steers))]
        with timed_steps(llm.llm_engine) as times:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        rows = [output.outputs[0] for output in outputs]
        return Leg(
            step_ms=statistics.median(times[-(steps + TAIL_STEPS) : -TAIL_STEPS]) * 1e3,
            tokens=tuple(tuple(row.token_ids) for row in rows),
            logprobs=tuple(row.cumulative_logprob for row in rows) if logprobs else (),
        )

    def _params(self, max_tokens: int, steer: str | None, *, logprobs: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if logprobs else None,
            extra_args=self._extra_args(steer) if steer else None,
        )


@contextmanager
def timed_steps(engine: Any) -> Iterator[list[float]]:
    """Within the block, the seconds of every ``engine.step()``."""
    times, step = [], engine.step

    def timed() -> Any:
        start = perf_counter()
        outputs = step()
        times.append(perf_counter() - start)
        return outputs

    engine.step = timed
    try:
        yield times
    finally:
        del engine.step


def _prompt(row: int, vocab_size: int) -> dict[str, list[int]]:
    return {
        "prompt_token_ids": [1 + (97 * row + i) % (vocab_size - 2) for i in range(PROMPT_TOKENS)]
    }


def measure(job: Job) -> list[dict[str, Any]]:
    """vllm-lens alone, at each batch size."""
    os.environ |= {"VLLM_PLUGINS": "activations"}
    llm = serve(job)
    from vllm_lens import SteeringVector

    vectors = torch.load(Path(job.steers) / f"{NAME}.pt", weights_only=True)

    def extra_args(steer: str) -> dict[str, Any]:
        strength = float(steer.partition(":")[2])
        vector = SteeringVector(
            activations=vectors, layer_indices=list(range(len(vectors))), scale=strength
        )
        return {"apply_steering_vectors": [vector]}

    leg = GenerateLeg(extra_args)
    return compare_alone(job, llm, f"{NAME}:{STRENGTH}", software("vllm-lens", "vllm"), leg)
