"""Requests and their expected results: a tiny model, its steers, and Hugging Face in float64.

All of it comes from the engine tests: their model, their settings, and their references, which
implement the papers' formulas. The machine with the GPU computes none of it.

    requests.json    the prompt and the steer of each request, and which kind of reference it has
    references.npz   per request ``i``: ``tokens_i`` and ``logprobs_i`` of the greedy text,
                     ``margins_i`` (first choice less second), ``prompt_i`` (the prompt's logprobs);
                     for dynamic ones ``strengths_i [doses, steps]`` and ``borders_i`` (how much
                     probability keeps the set of likeliest tokens from being another)
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[2] / "tests"
TOKENS = 12
DYNAMIC_TOKENS = 8


def write(folder: Path, *, few: bool = False) -> None:
    """Write model, steers, requests and references; ``few`` of them for a dry run."""
    sys.path[:0] = [str(TESTS), str(TESTS / "engine")]
    from dynamic_settings import SETTINGS
    from engines import (
        GUIDED,
        MIXED,
        doses_of,
        guidance_steers,
        prompts,
        random_steers,
        steer_config,
    )
    from reference import load_reference
    from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    path = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    steers = {**random_steers(HIDDEN, VOCAB), **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)}
    steer_config(steers, folder / "steers")
    fixed = [*MIXED, *GUIDED][:: 9 if few else 1]
    dynamic = SETTINGS[:: 10 if few else 1]
    model, arrays, requests = load_reference(path), {}, []
    all_prompts = prompts(len(fixed) + len(dynamic))
    for index, (setting, prompt) in enumerate(zip([*fixed, *dynamic], all_prompts, strict=True)):
        ids, doses = prompt["prompt_token_ids"], doses_of(setting, steers)
        is_dynamic = index >= len(fixed)
        results = (_dynamic if is_dynamic else _fixed)(model, ids, doses, steers)
        arrays |= {f"{name}_{index}": array for name, array in results.items()}
        requests.append({"prompt": ids, "steer": setting, "dynamic": is_dynamic})
    np.savez_compressed(folder / "references.npz", **arrays)
    (folder / "requests.json").write_text(json.dumps(requests, indent=1) + "\n")


def _fixed(
    model: Any, prompt: Sequence[int], doses: Sequence[Any], steers: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    from reference import guided_logprobs

    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(guided_logprobs(model, ids, len(prompt), doses, steers)[-1].argmax()))
    logprobs = guided_logprobs(model, ids, len(prompt), doses, steers)
    of_prompt = logprobs[: len(prompt) - 1].gather(1, _column(prompt[1:]))[:, 0]
    return {
        "prompt": of_prompt.numpy(),
        **_choices(ids[len(prompt) :], logprobs[len(prompt) - 1 :]),
    }


def _dynamic(
    model: Any, prompt: Sequence[int], doses: Sequence[Any], steers: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    from dynamic_reference import reference_generate

    trace = reference_generate(model, prompt, doses, steers, max_tokens=DYNAMIC_TOKENS)
    names = [dose.steer for dose in doses if dose.dynamic]
    return {
        **_choices(trace.tokens, trace.logprobs),
        "strengths": np.array([trace.strengths[name] for name in names]),
        "borders": np.array([trace.boundaries[name] for name in names]),
    }


def _choices(tokens: Sequence[int], logprobs: Any) -> dict[str, np.ndarray]:
    """Logprobs of the tokens and margin of each choice; ``logprobs [steps or more, vocab]``."""
    steps = logprobs[: len(tokens)]
    first, second = steps.topk(2).values.T
    return {
        "tokens": np.array(tokens, dtype=np.int64),
        "logprobs": steps.gather(1, _column(tokens))[:, 0].numpy(),
        "margins": (first - second).numpy(),
    }


def _column(tokens: Sequence[int]) -> Any:
    import torch

    return torch.tensor(list(tokens))[:, None]
