"""The fake scheduler of other tests against vLLM's own: the same requests, step by step."""

import inspect
import random
from typing import Any

import pytest
import torch
from engine_tools import engine_config
from fake_scheduler import FakeRequest, NewScheduler
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

STEPS = 400


def vllm_scheduler(max_num_seqs: int, num_blocks: int, budget: int) -> Scheduler:
    """vLLM's scheduler with blocks of one token, as in the fake scheduler."""
    config = engine_config(
        {},
        scheduler_config__max_num_seqs=max_num_seqs,
        scheduler_config__max_num_batched_tokens=budget,
        scheduler_config__async_scheduling=False,
        cache_config__block_size=1,
        cache_config__enable_prefix_caching=False,
        cache_config__num_gpu_blocks=num_blocks + 1,
    )
    spec = FullAttentionSpec(block_size=1, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(
        num_blocks=num_blocks + 1,  # one is the null block
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    arguments: dict[str, Any] = {
        "vllm_config": config,
        "kv_cache_config": kv,
        "structured_output_manager": StructuredOutputManager(config),
        "block_size": 1,
        "hash_block_size": 1,
        "log_stats": False,
    }
    parameters = inspect.signature(Scheduler.__init__).parameters
    return Scheduler(**{name: value for name, value in arguments.items() if name in parameters})


def step(scheduler: Any, requests: dict[str, Any]) -> dict[str, int]:
    """One step, in which each request that has read all of its text writes a token."""
    output = scheduler.schedule()
    scheduled = dict(output.num_scheduled_tokens)
    ids = list(scheduled)
    tokens: list[list[int]] = [
        [7] if requests[req_id].num_computed_tokens >= requests[req_id].num_tokens else []
        for req_id in ids
    ]
    if ids:
        runner_output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(ids)},
            sampled_token_ids=tokens,
        )
        scheduler.update_from_output(output, runner_output)
    return scheduled


@pytest.mark.parametrize("seed", range(30))
def test_plain_requests_are_scheduled_as_vllm_schedules_them(seed: int) -> None:
    rng = random.Random(seed)
    limits = {
        "max_num_seqs": rng.choice([2, 3, 8]),
        "num_blocks": rng.choice([24, 40, 400]),
        "budget": rng.choice([6, 16, 100]),
    }
    fake, real = NewScheduler(**limits), vllm_scheduler(**limits)
    requests: dict[str, Any] = {}
    other: dict[str, Any] = {}
    waiting = [(rng.randrange(1, 12), rng.randrange(1, 9)) for _ in range(14)]
    for number in range(STEPS):
        while waiting and rng.random() < 0.5:
            prompt, max_tokens = waiting.pop()
            name = f"r{len(requests)}"
            requests[name] = FakeRequest(
                name, prompt, max_tokens, arrival_time=float(len(requests))
            )
            other[name] = Request(
                name,
                prompt_token_ids=[1] * prompt,
                sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                pooling_params=None,
                arrival_time=float(len(requests)),
            )
            fake.add_request(requests[name])
            real.add_request(other[name])
        assert step(fake, requests) == step(real, other), (number, limits)
        assert {n: r.status for n, r in requests.items()} == {n: r.status for n, r in other.items()}
        if not (waiting or fake.requests):
            return
    raise AssertionError("requests are left")
