"""Forward hooks in vLLM: one vector for all requests, added to the output of each layer.

The usual hand-written way: an engine with ``enforce_eager=True``, since a compiled model and CUDA
graphs do not run Python hooks, and ``register_forward_hook`` on every layer. vllm-steer is measured
with the same weights and vectors, compiled.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.decode import BenchmarkEngine
from benchmarks.dummy_model import STRENGTH
from benchmarks.engines import greedy
from benchmarks.peers.job import TOLERANCE, PeerJob

NAME = "guided"
GENTLE = STRENGTH / 50  # small, so that the output still depends on the tokens and can be compared
STEER_STRENGTH = f"{NAME}:{GENTLE}"


class HookedEngine(BenchmarkEngine):
    """A request with a steer enables the hooks, another disables them, for all running requests."""

    def __init__(self, llm: Any, vectors: torch.Tensor) -> None:
        super().__init__(llm)
        self._vectors = vectors
        self._handles: list[Any] = []

    def add(self, request_id: str, tokens: list[int], steer: str | None, params: Any) -> None:
        """Add a request without a steer argument: the vector is global."""
        if bool(steer) != bool(self._handles):
            self._switch()
        super().add(request_id, tokens, None, params)

    def _switch(self) -> None:
        if not self._handles:
            vectors = GENTLE * self._vectors
            (self._handles,) = self.llm.apply_model(lambda model: hook_layers(model, vectors))
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []


def hook_layers(model: nn.Module, vectors: torch.Tensor) -> list[Any]:
    """Add ``vectors[l]`` to the output of layer ``l`` of vLLM's GPT-2; returns the hook handles."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    rows = vectors.to(next(model.parameters()))
    return [_hook(layer, row) for layer, row in zip(layers, rows, strict=True)]


def _hook(layer: nn.Module, vector: torch.Tensor) -> Any:
    return layer.register_forward_hook(lambda _module, _args, output: output + vector)


def check_prompt_logprobs(
    job: PeerJob, ours: BenchmarkEngine, peer: BenchmarkEngine, steer: str
) -> None:
    """Check that two vLLM engines give one prompt the same steered log probabilities, different
    from the unsteered ones."""
    plain, expected, actual = (
        _prompt_logprobs(engine, requested, job.dimensions.vocab_size)
        for engine, requested in ((ours, None), (ours, steer), (peer, steer))
    )
    error, change = ((other - expected).abs() for other in (actual, plain))
    assert error.max() < TOLERANCE[job.dtype], f"log probabilities differ by {error.max()}"
    assert change.mean() > 4 * error.mean(), "the steer changes no more than rounding does"


def _prompt_logprobs(
    benchmark_engine: BenchmarkEngine, steer: str | None, vocab_size: int
) -> torch.Tensor:
    tokens = [1 + 89 * place % (vocab_size - 2) for place in range(32)]
    benchmark_engine.add("prompt", tokens, steer, greedy(1, prompt_logprobs=0))
    engine, outputs = benchmark_engine.llm.llm_engine, []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    pairs = zip(tokens[1:], outputs[-1].prompt_logprobs[1:], strict=True)
    return torch.tensor([candidates[token].logprob for token, candidates in pairs])


def measure(job: PeerJob) -> list[dict[str, Any]]:
    """Measure vllm-steer and the hooks at each batch size."""
    from vllm_steer import load_steer

    eager = job.engine(enforce_eager=True)
    ours = (job.engine([NAME]), STEER_STRENGTH)
    vectors = load_steer(job.steers / f"{NAME}.safetensors").vectors
    peer = (HookedEngine(eager.llm, vectors), STEER_STRENGTH)
    check_prompt_logprobs(job, ours[0], *peer)
    return job.both("ours guided", ours, peer)
