"""Real vLLM engines in this process, and the steers and requests that the tests give them."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_steer import LMSteer, save_steer

RUNNER = os.environ.get("VLLM_STEER_TEST_RUNNER", "v1")

# At least 8 requests with at least 6 settings: every variant, mixes, zero and none.
MIXED: tuple[dict[str, float], ...] = (
    {},
    {"plain": 3.0},
    {"plain": -3.0},
    {"dummy": 2.0},
    {"wide": 1.5},
    {"bias": 4.0},
    {"tilt": -3.0},
    {"plain": 1.0, "dummy": -2.0, "bias": 2.0, "tilt": 1.0},
    {"plain": 0.0},
    {"wide": -1.0, "dummy": 1.0},
)


def random_steers(hidden_size: int, vocab_size: int) -> dict[str, LMSteer]:
    """One steer of each variant and of mixed ranks, strong enough to change what is written."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def multiply(columns: int, rank: int, fixed: tuple[int, ...] = ()) -> LMSteer:
        return LMSteer(
            variant="multiply",
            projector1=normal(columns, hidden_size, rank),
            projector2=normal(columns, hidden_size, rank),
            epsilon=0.1 / hidden_size,
            hidden_size=hidden_size,
            fixed_columns=fixed,
        )

    return {
        "plain": multiply(1, 8),
        "dummy": multiply(2, 5, fixed=(1,)),
        "wide": multiply(1, hidden_size // 2 + 9),
        "bias": LMSteer(
            variant="add", add=normal(1, hidden_size), epsilon=0.05, hidden_size=hidden_size
        ),
        "tilt": LMSteer(
            variant="offset",
            offset=normal(2, vocab_size),
            epsilon=0.3,
            hidden_size=hidden_size,
            fixed_columns=(0,),
        ),
    }


def steer_config(steers: Mapping[str, LMSteer], folder: Path) -> dict[str, Any]:
    """Save steers and name them in a config dict."""
    folder.mkdir(exist_ok=True)
    for name, steer in steers.items():
        save_steer(steer, folder / f"{name}.safetensors")
    return {"steers": {name: {"path": str(folder / f"{name}.safetensors")} for name in steers}}


@contextmanager
def engine(model: Path | str, steer: Any = None, **options: Any) -> Iterator[Any]:
    """An ``LLM`` on the runner under test; shut down afterwards."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "seed": 0,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    if steer is not None:
        settings["additional_config"] = {"steer": steer}
    llm = LLM(str(model), **{**settings, **options})
    assert llm.llm_engine.vllm_config.use_v2_model_runner == (RUNNER == "v2")
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(count: int, *, length: int = 12, vocab_size: int = 500) -> list[dict[str, Any]]:
    """Different random prompts of mixed lengths, as token ids."""
    generator = torch.Generator().manual_seed(11)
    lengths = [max(2, length - 3 * (index % 4)) for index in range(count)]
    return [
        {"prompt_token_ids": torch.randint(3, vocab_size, (n,), generator=generator).tolist()}
        for n in lengths
    ]


def greedy(
    settings: Sequence[Mapping[str, float]], *, max_tokens: int = 12, **options: Any
) -> list[Any]:
    """Greedy sampling parameters, one per setting; an empty setting does not ask for a steer."""
    from vllm import SamplingParams

    return [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=1,
            detokenize=False,
            extra_args={"steer": dict(setting)} if setting else None,
            **options,
        )
        for setting in settings
    ]
