"""vLLM engines in this process, and greedy requests to them."""

import os
from pathlib import Path
from typing import Any

import torch

from vllm_steer.cli.libraries import set_verbosity

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def set_environment() -> None:
    """Set missing environment variables and hold libraries' messages back; call it before vLLM is
    imported.
    """
    set_verbosity(False)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def make_engine(
    folder: Path | str,
    steer_config: dict[str, Any] | None = None,
    *,
    plugin: bool = True,
    gpu_memory: float = 0.25,
    **options: Any,
) -> Any:
    """An engine, compiled as by default. ``plugin=False``: stock vLLM, if no engine with the plugin
    was made before, since the plugin patches vLLM in this process permanently.
    """
    os.environ["VLLM_STEER_DISABLE"] = "0" if plugin else "1"
    from vllm import LLM

    if plugin:  # vLLM loads plugins once per process; an earlier engine may have disabled them
        from vllm_steer.plugin import register

        register()
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
    }
    if torch.cuda.is_available():
        defaults["gpu_memory_utilization"] = gpu_memory
    additional = {} if steer_config is None else {"steer": steer_config}
    return LLM(str(folder), additional_config=additional, **defaults | options)


def greedy(max_tokens: int, steer: Any = None, **options: Any) -> Any:
    """Sampling parameters of a request that is greedy, of a fixed length, and not detokenised."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    defaults = {
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "extra_args": {"steer": steer} if steer else None,
    }
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        **defaults | options,
    )
