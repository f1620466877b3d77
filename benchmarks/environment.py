"""The environment of the engines that a benchmark makes in its own process."""

import os

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def set_defaults() -> None:
    """Set what the outer environment does not; call it before vLLM is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
