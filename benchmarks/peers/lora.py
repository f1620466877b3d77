"""vLLM's own LoRA as a reference point: all rows with an adapter over no row with one.

LoRA changes every layer and is fitted differently, so it does not replace a steer, but it is the
low-rank change per request that vLLM's users know, on vLLM's own kernels. The adapter has random
factors on the query and value projections (peft's default for a Llama); vLLM runs its LoRA layers
in every projection once LoRA is enabled. On a CPU vLLM does not compile a model that serves LoRA.
vllm-steer is measured with an LM-Steer of the same rank on the same weights.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import BenchmarkEngine
from benchmarks.dummy_model import STRENGTH, write_steers
from benchmarks.peers.job import PeerJob

MAX_RANK = 64  # vLLM accepts only powers of two
STEER_STRENGTH = f"s0:{STRENGTH}"


class LoraEngine(BenchmarkEngine):
    """An engine whose requests with a steer use the adapter."""

    def __init__(self, llm: Any, adapter: Path) -> None:
        super().__init__(llm)
        from vllm.lora.request import LoRARequest

        self._lora = LoRARequest("adapter", 1, str(adapter))

    def add(self, request_id: str, tokens: list[int], steer: str | None, params: Any) -> None:
        """Add a request with the adapter."""
        lora = {"lora_request": self._lora} if steer else {}
        prompt = {"prompt_token_ids": tokens}
        self.llm.llm_engine.add_request(request_id, prompt, params, **lora)


def write_adapter(job: PeerJob, folder: Path) -> Path:
    """Write a peft adapter with two random factors, so it changes the model without training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype)
    torch.manual_seed(1)
    config = LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def measure(job: PeerJob) -> list[dict[str, Any]]:
    """Measure vllm-steer and LoRA of one rank at each batch size."""
    with tempfile.TemporaryDirectory(prefix="lora-") as name:
        folder, rank = Path(name), min(job.rank, MAX_RANK)
        write_steers(job.dimensions, folder / "steers", count=1, rank=rank)
        job = replace(job, rank=rank, steers=folder / "steers")
        served = job.engine(enable_lora=True, max_loras=1, max_lora_rank=rank)
        peer = (LoraEngine(served.llm, write_adapter(job, folder / "adapter")), STEER_STRENGTH)
        ours = (job.engine(["s0"]), STEER_STRENGTH)
        return job.both("ours lm-steer", ours, peer, rank)
