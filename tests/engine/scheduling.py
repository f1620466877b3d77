"""Inspects an engine in this process: its scheduler, and resources that it still holds."""

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

from engines import greedy


def scheduler_of(llm: Any) -> Any:
    """vLLM's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def preemptions(llm: Any) -> float:
    """The number of preemptions."""
    return float({m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value)


def leftovers(llm: Any) -> dict[str, int]:
    """State of finished requests that is still held; empty if there is no leak."""
    scheduler = scheduler_of(llm)
    running, waiting = scheduler.get_request_counts()
    pool = scheduler.kv_cache_manager.block_pool
    resources = {
        "running": running,
        "waiting": waiting,
        "requests": len(scheduler.requests),
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one is the null block
    }
    streams = getattr(scheduler, "vllm_steer_streams", None)
    if streams is not None:
        resources["groups"] = len(streams.groups)
        resources["members"] = len(streams._group_of)
    return {name: count for name, count in resources.items() if count}


def pooled_strengths(llm: Any) -> int:
    """The number of strengths in the worker's pool, after a step that reports finished requests."""
    from vllm_steer.serving.dynamic.requests import StrengthPool

    llm.generate({"prompt_token_ids": [5]}, greedy([{}], max_tokens=1), use_tqdm=False)
    gc.collect()
    return sum(pool.num_taken for pool in gc.get_objects() if type(pool) is StrengthPool)


def resident_mib() -> float:
    """Resident memory of this process, without free memory of the allocator."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_objects() -> int:
    """Python's objects that refer to others, garbage excluded."""
    gc.collect()
    return len(gc.get_objects())
