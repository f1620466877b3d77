"""What a user would run instead of vllm-steer, one file per baseline.

| peer          | file             | what it is                                             |
|---------------|------------------|--------------------------------------------------------|
| `hf-lm-steer` | `hf_lm_steer.py` | LM-Steer on Hugging Face, one steer for the batch      |
| `hooks-eager` | `hooks_eager.py` | forward hooks in an eager vLLM, one vector for all     |
| `lora-r64`    | `lora.py`        | vLLM's own LoRA, another low-rank change: a yardstick  |

Each has ``measure(job) -> list of result lines``, with vllm-steer beside it in legs that take
turns, and runs in a process of its own, for some change vLLM for good.
"""
