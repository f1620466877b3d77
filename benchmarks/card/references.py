"""Requests and their expected results: a tiny model, its steers, and Hugging Face in float64.

All of it comes from the engine tests: their model, their settings, and their references, which
implement the papers' formulas. The machine with the GPU computes none of it.

    requests.json    the prompt and the steer of each request, which kind of reference it has, and
                     whether it has a condition, with which no prompt logprobs are given
    engine.json      options of the engine
    references.npz   per request ``i``: ``tokens_i`` and ``logprobs_i`` of the greedy text,
                     ``margins_i`` (first choice less second), ``prompt_i`` (the prompt's logprobs);
                     for dynamic ones ``strengths_i [doses, steps]`` and ``borders_i`` (how much
                     probability keeps the set of likeliest tokens from being another)
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[2] / "tests"
TOKENS = 12
DYNAMIC_TOKENS = 8
LONG_PROMPT = 120
FEW_READING = (3, 7, 12, 16, 21, 22, 23)
"""A window, phase answer, an SAE's feature, a low-rank map, and one, any and all conditions."""
CHUNKS = {"max_num_seqs": 64, "max_num_batched_tokens": 96}
"""A long prompt is more than one step, which is more than the largest graph."""


@dataclass(frozen=True)
class Scenario:
    """Steers, and the requests of one batch: settings and prompts, the dynamic ones last."""

    steers: Mapping[str, Any]
    settings: Sequence[Mapping[str, Any]]
    prompts: Sequence[Sequence[int]]
    num_dynamic: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, *, few: bool = False, reading: bool = False) -> None:
    """Write model, steers, requests and references; ``few`` of them for a dry run.

    ``reading``: those of steers that read the token, of conditions, and of windows, for an engine
    of their own, because with them an engine has other kernels for all steers of a site.
    """
    sys.path[:0] = [str(TESTS), str(TESTS / "engine")]
    from engines import doses_of, steer_config
    from reference import load_reference
    from tiny_models import GUIDED_LAYERS, save_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    path = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    scenario = _reading(few=few) if reading else _plain(few=few)
    steers = scenario.steers
    steer_config(steers, folder / "steers")
    model, arrays, requests = load_reference(path), {}, []
    num_fixed = len(scenario.settings) - scenario.num_dynamic
    pairs = zip(scenario.settings, scenario.prompts, strict=True)
    for index, (setting, ids) in enumerate(pairs):
        doses, is_dynamic = doses_of(setting, steers), index >= num_fixed
        results = (_dynamic if is_dynamic else _fixed)(model, ids, doses, steers)
        arrays |= {f"{name}_{index}": array for name, array in results.items()}
        is_gated = any(dose.gate for dose in doses)
        requests.append({"prompt": ids, "steer": setting, "dynamic": is_dynamic, "gated": is_gated})
    np.savez_compressed(folder / "references.npz", **arrays)
    (folder / "requests.json").write_text(json.dumps(requests, indent=1) + "\n")
    (folder / "engine.json").write_text(json.dumps(dict(scenario.options)) + "\n")


def _plain(*, few: bool) -> Scenario:
    from dynamic_settings import SETTINGS
    from engines import GUIDED, MIXED, guidance_steers, prompts, random_steers
    from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB

    fixed = [*MIXED, *GUIDED][:: 9 if few else 1]
    dynamic = SETTINGS[:: 10 if few else 1]
    settings = [*fixed, *dynamic]
    return Scenario(
        {**random_steers(HIDDEN, VOCAB), **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)},
        settings,
        [prompt["prompt_token_ids"] for prompt in prompts(len(settings))],
        num_dynamic=len(dynamic),
    )


def _reading(*, few: bool) -> Scenario:
    """Every setting with a short prompt and with one that is longer than a step."""
    from engines import (
        READING,
        conditions,
        guidance_steers,
        prompts,
        random_steers,
        reading_steers,
    )
    from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB

    settings = [READING[i] for i in FEW_READING] if few else READING
    short = prompts(len(settings))
    long = prompts(len(settings), length=LONG_PROMPT)
    both = [*long[:1], *short] if few else [*long, *short]
    return Scenario(
        {
            **random_steers(HIDDEN, VOCAB),
            **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN),
            **reading_steers(HIDDEN, GUIDED_LAYERS),
            **conditions(HIDDEN, GUIDED_LAYERS),
        },
        [*settings[: len(both) - len(settings)], *settings],
        [prompt["prompt_token_ids"] for prompt in both],
        options=CHUNKS,
    )


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
