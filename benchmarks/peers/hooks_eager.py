"""Forward hooks in vLLM: one vector for everybody, added to the output of each layer.

What one writes by hand: an engine with ``enforce_eager=True``, since a compiled model and CUDA
graphs do not run Python hooks, and ``register_forward_hook`` on every layer. vllm-steer stands
beside it with the same weights and the same vectors, compiled.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.decode import Engine
from benchmarks.dummy_model import STRENGTH
from benchmarks.peers.agreement import check_prompt_logprobs
from benchmarks.peers.job import Job

NAME = "guided"
GENTLE = STRENGTH / 50  # so that the tokens still count in what comes out, and can be compared
ASKED = f"{NAME}:{GENTLE}"


class HookedEngine(Engine):
    """Requests that ask for a steer switch the hooks on, others off: for everything that runs."""

    def __init__(self, llm: Any, vectors: torch.Tensor) -> None:
        super().__init__(llm)
        self._vectors = vectors
        self._handles: list[Any] = []

    def add(self, request_id: str, tokens: list[int], steer: str | None, params: Any) -> None:
        """Nothing is passed on: the vector is global."""
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
    """Add ``vectors[l]`` to what layer ``l`` of a vLLM model returns, from now on; the handles.

    A layer that returns its stream as a pair, whose sum it is, gets the vector in the first.
    """
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    rows = vectors.to(next(model.parameters()))
    return [_hook(layer, row) for layer, row in zip(layers, rows, strict=True)]


def _hook(layer: nn.Module, vector: torch.Tensor) -> Any:
    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    return layer.register_forward_hook(add)


def measure(job: Job) -> list[dict[str, Any]]:
    """vllm-steer and the hooks, at each batch size."""
    from vllm_steer import load_steer

    eager = job.engine(enforce_eager=True)
    ours = (job.engine([NAME]), ASKED)
    vectors = load_steer(job.steers / f"{NAME}.safetensors").vectors
    peer = (HookedEngine(eager.llm, vectors), ASKED)
    check_prompt_logprobs(job, ours[0], *peer)
    lines = []
    for rows in job.rows:
        lines.append(job.alone("ours guided", ours, rows))
        lines.append(job.beside(job.peer, ours, peer, rows))
    return lines
