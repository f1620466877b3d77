"""vLLM engines of one configuration, and engines whose requests are changed on their way in."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peers.job import Job

STEER = "steer"


def serve(job: Job, **options: Any) -> Any:
    """A stock vLLM engine on the job's model. Make it before ``ours``, which changes vLLM."""
    os.environ["VLLM_STEER_DISABLE"] = "1"
    return _engine(job, **options)


def ours(job: Job, names: Sequence[str]) -> Any:
    """An engine with vllm-steer and the named steers of the job, compiled as vLLM does by default;
    the plugin is registered in this process from then on."""
    os.environ["VLLM_STEER_DISABLE"] = "0"
    from dummy_model import steer_config

    from vllm_steer.plugin import register

    register()
    paths = {name: Path(job.steers) / f"{name}.safetensors" for name in names}
    return _engine(job, additional_config={"steer": steer_config(paths, job.rank)})


def software(*distributions: str) -> str:
    """Names and versions for a result line."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)


class Rewritten:
    """An engine that ``decode.run_leg`` drives as any other, with requests rewritten on the way in.

    ``request(steer)`` gives what a request that asks for ``steer`` (None: for none) passes to the
    peer instead: ``extra_args`` of its sampling parameters and keywords of ``add_request``.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self.step = self._engine.step
        self.has_unfinished_requests = self._engine.has_unfinished_requests

    @property
    def llm_engine(self) -> "Rewritten":
        """Itself: what ``run_leg`` asks an ``LLM`` for."""
        return self

    def request(self, steer: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(extra_args, keywords of add_request)``."""
        raise NotImplementedError

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        """As vLLM's."""
        asked = (params.extra_args or {}).get(STEER)
        params.extra_args, keywords = self.request(asked)
        self._engine.add_request(request_id, prompt, params, **keywords)


def _engine(job: Job, **options: Any) -> Any:
    from vllm import LLM

    on_gpu = {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}
    return LLM(
        job.model,
        skip_tokenizer_init=True,
        dtype=job.dtype,
        max_model_len=256,
        max_num_seqs=max(job.rows),
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **on_gpu,
        **options,
    )
