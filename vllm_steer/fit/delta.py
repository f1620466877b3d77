"""Fit step deltas: the mean difference of activations per generation step between two sets of
prompts.

    Delta[i, l] = mean_A h_l[P-1+i] - mean_B h_l[P-1+i]

``A`` are the prompts with the property, ``B`` the other prompts, and each generates its own text
greedily. ``h_l`` is the site of layer ``l`` and the position the last one of generation step ``i``:
the last prompt token at step 0, then each generated token. A mean is over the prompts that reached
the step.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), section 3.1.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import all_layers, context_length, recorded
from vllm_steer.hf.language_model import last_logits_only
from vllm_steer.steers import DeltaSteer
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.sites import DELTA_SITES, DeltaSite
from vllm_steer.untrusted_text import shown


def fit_delta(
    model: Any,
    tokenizer: Any,
    wanted_prompts: Sequence[str],
    other_prompts: Sequence[str],
    *,
    steps: int = 30,
    site: DeltaSite = "heads",
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> DeltaSteer:
    """The deltas ``[steps, layers, width]``, float32.

    A prompt's generation ends only at an end-of-text token of the model's generation config; this
    token is not a step. ``layers`` None takes every layer. Means are taken in float64; generation
    is greedy, so the same prompts give the same deltas. ``on_prompt`` is called with the number of
    prompts answered so far.

    Raises ``SteerError`` for a side without prompts, a step that no prompt of a side reached, zero
    steps or more than the context length, an unknown site or layer, and a prompt of more than
    ``max_length`` tokens (default: the context length less the answer).
    """
    check_choice("site", site, DELTA_SITES)
    if steps < 1:
        raise SteerError(f"steps is {steps}; a delta has at least one")
    chosen = tuple(sorted(all_layers(model) if layers is None else layers))
    prompt_number = itertools.count(1)
    max_prompt_tokens = (
        context_length(model, sys.maxsize) - steps + 1
    )  # the last token is not read again
    if max_prompt_tokens < 1:
        raise SteerError(
            f"steps is {steps}; the model reads {max_prompt_tokens + steps - 1} tokens, prompt "
            "and steps "
            "together: give fewer steps"
        )
    longest = max_prompt_tokens if max_length is None else min(max_prompt_tokens, max_length)

    def mean(side: str, prompts: Sequence[str]) -> torch.Tensor:
        totals, counts = [], []
        for batch in _batches(tokenizer, prompts, batch_size, longest):
            states, reached = generate_steps(model, batch, steps=steps, site=site, layers=chosen)
            totals.append((states.double() * reached[:, :, None, None]).sum(0))
            counts.append(reached.sum(0))
            for _ in batch:
                if on_prompt is not None:
                    on_prompt(next(prompt_number))
        if not totals:
            raise SteerError(f"there are no {side} prompts; give at least one")
        return torch.stack(totals).sum(0) / _counts(side, counts)[:, None, None]

    return DeltaSteer(
        delta=(mean("wanted", wanted_prompts) - mean("other", other_prompts)).float(),
        layers=chosen,
        site=site,
        base_model=model.config.name_or_path,
    )


@torch.no_grad()
def generate_steps(
    model: Any, tokens: torch.Tensor, *, steps: int, site: str, layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer prompts ``[batch, P]`` greedily and keep the last position of each step.

    Returns activations ``[batch, steps, layers, width]`` and ``[batch, steps]`` bool: whether the
    prompt reached the step.
    """
    ends = torch.tensor(_end_tokens(model), device=model.device)
    alive = torch.ones(len(tokens), dtype=torch.bool, device=model.device)
    states, reached, cache = [], [], None
    options = {"use_cache": True, **last_logits_only(model)}
    tokens = tokens.to(model.device)
    with recorded(model, site, layers, lambda x: x[:, -1]) as recording:
        for _ in range(steps):
            output = model(input_ids=tokens, past_key_values=cache, **options)
            cache = output.past_key_values
            states.append(recording.stacked())
            reached.append(alive.cpu())
            tokens = output.logits[:, -1:].argmax(-1)
            alive = alive & ~torch.isin(tokens[:, 0], ends)
    return torch.stack(states, 1), torch.stack(reached, 1)


def _batches(
    tokenizer: Any, prompts: Sequence[str], batch_size: int, longest: int
) -> Iterator[torch.Tensor]:
    """Batches of prompts of equal length, so that none is padded."""
    encoded = sorted((_encode(tokenizer, prompt, longest) for prompt in prompts), key=len)
    for _, equal_length in itertools.groupby(encoded, key=len):
        rows = list(equal_length)
        for start in range(0, len(rows), batch_size):
            yield torch.tensor(rows[start : start + batch_size])


def _encode(tokenizer: Any, prompt: str, longest: int) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not 0 < len(ids) <= longest:
        raise SteerError(
            f"prompt {shown(prompt)} has {len(ids)} tokens; 1 to {longest} are allowed, as many "
            "as leave room for the steps: give shorter prompts, or fewer demonstrations or steps"
        )
    return ids


def _counts(side: str, counts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The number of prompts that reached each step; ``SteerError`` for a step without any."""
    reached = torch.stack(list(counts)).sum(0)
    if not reached.all():
        step = int((reached == 0).nonzero()[0])
        raise SteerError(
            f"every answer to the {side} prompts ended before step {step}; give more prompts or "
            f"steps={step}"
        )
    return reached


def _end_tokens(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list | tuple) else [eos]
