"""What a user would run instead of vllm-steer, one file per baseline.

| peer           | file              | what it is                                             |
|----------------|-------------------|--------------------------------------------------------|
| `hf-lm-steer`  | `hf_lm_steer.py`  | LM-Steer on Hugging Face, one steer for the batch      |
| `hooks-eager`  | `hooks_eager.py`  | forward hooks in an eager vLLM, one vector for all     |
| `lora-r64`     | `lora.py`         | vLLM's own LoRA, another low-rank change: a yardstick  |
| `hotwire-vllm` | `hotwire_vllm.py` | PyPI package: vectors in the layers of a CUDA vLLM     |
| `vllm-lens`    | `vllm_lens.py`    | PyPI package: vectors in the layers of an eager vLLM   |

Each has ``measure(job) -> list of result lines`` and runs in a process of its own (``run.py``):
some change vLLM for good, and the last two need an environment of their own, for which their files
import only vLLM, torch and what here does the same. The first three measure vllm-steer beside them.
"""
