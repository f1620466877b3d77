"""What a user would run instead of vllm-steer, one file per baseline.

Each has ``measure(job) -> list of result lines``, with vllm-steer beside it in legs that take
turns, and runs in a process of its own, for some change vLLM for good.
"""
