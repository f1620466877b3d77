"""Alternatives to vllm-steer, one file per baseline.

Each has ``measure(job) -> list of result lines``, in legs interleaved with vllm-steer, and runs in
its own process, since some patch vLLM permanently.
"""
