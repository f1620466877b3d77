"""Scenarios that need a Python process of their own: ``python own_process.py SCENARIO``.

N-gram speculation imports numba, after which vLLM's CPU platform starts no second engine in this
process; parallel engines start workers that import the main module again; an engine without the
plugin must never have loaded it.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401 (sets the environment, in worker processes too)
from engines import MIXED, engine, greedy, prompts, random_steers, steer_config
from reference import assert_greedy, load_reference
from tiny_models import HIDDEN, VOCAB, save_tiny_model


def ngram_speculation(folder: Path) -> None:
    """Several logits rows per request, of which some are drafts that are accepted."""
    model = save_tiny_model("llama", folder / "model")
    steers = random_steers(HIDDEN, VOCAB)
    repeated = [{"prompt_token_ids": p["prompt_token_ids"][:4] * 5} for p in prompts(len(MIXED))]
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    config = steer_config(steers, folder / "steers")
    with engine(model, config, speculative_config=speculative) as llm:
        outputs = llm.generate(repeated, greedy(MIXED, max_tokens=100), use_tqdm=False)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_draft_tokens"].value > 0
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"].value
    assert accepted > 0
    check(outputs, model, steers)
    print(f"accepted drafts: {accepted}")


def parallel(folder: Path, **options: Any) -> None:
    """A mixed batch on two worker processes, prompt logprobs included."""
    model = save_tiny_model("llama", folder / "model")
    steers = random_steers(HIDDEN, VOCAB)
    options = {"distributed_executor_backend": "mp", "enforce_eager": False, **options}
    with engine(model, steer_config(steers, folder / "steers"), **options) as llm:
        outputs = llm.generate(
            prompts(len(MIXED)), greedy(MIXED, prompt_logprobs=1), use_tqdm=False
        )
    check(outputs, model, steers)


def tensor_parallel(folder: Path) -> None:
    """Two tensor-parallel ranks: the vocabulary is sharded, the hidden state is not."""
    parallel(folder, tensor_parallel_size=2)


def pipeline_parallel(folder: Path) -> None:
    """Two pipeline stages: only the last one has a head."""
    parallel(folder, pipeline_parallel_size=2)


def stock_logprobs(folder: Path) -> None:
    """Print, exactly, what an engine gives that has never heard of the plugin."""
    assert os.environ["VLLM_PLUGINS"] == ""
    model = save_tiny_model("llama", folder / "model")
    with engine(model) as llm:
        outputs = llm.generate(
            prompts(len(MIXED)),
            greedy([{}] * len(MIXED), max_tokens=16, prompt_logprobs=1),
            use_tqdm=False,
        )
    assert not any(name.startswith("vllm_steer.serving") for name in sys.modules)
    print(json.dumps([exact(output) for output in outputs]))


def exact(output: Any) -> dict[str, Any]:
    """Tokens and all logprobs of an output, floats as hexadecimal text."""
    steps = [step for step in [*output.prompt_logprobs, *output.outputs[0].logprobs] if step]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [
            sorted((token, entry.logprob.hex()) for token, entry in step.items()) for step in steps
        ],
    }


def check(outputs: list[Any], model: Path, steers: dict[str, Any]) -> None:
    """Compare a MIXED batch with the reference."""
    reference = load_reference(model)
    for output, setting in zip(outputs, MIXED, strict=True):
        assert_greedy(output, reference, {n: s for n, s in setting.items() if s}, steers)
    print(f"{len(outputs)} outputs equal the reference")


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "ngram-speculation": ngram_speculation,
    "tensor-parallel": tensor_parallel,
    "pipeline-parallel": pipeline_parallel,
    "stock-logprobs": stock_logprobs,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        SCENARIOS[sys.argv[1]](Path(temporary))
