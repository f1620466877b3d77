"""Scores the engine's output with Hugging Face, by teacher forcing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_steer import hf
from vllm_steer.doctor.engine_process import Completion, Setting
from vllm_steer.errors import SteerError, cause
from vllm_steer.hf.language_model import auto_class
from vllm_steer.models import model_path
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class ReferenceComparison:
    """An engine's output compared with the reference, over all tokens of some completions.

    difference  maximum difference of a token's log-probability
    shortfall   maximum gap, in the reference, between its best token and the engine's
    agreement   share of tokens that are also the reference's choice
    """

    difference: float
    shortfall: float
    agreement: float


def load_model(name: str, dtype: str) -> Any:
    """Load the reference model, on a GPU if there is one. Raises ``SteerError`` if that fails."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        auto = auto_class(AutoConfig.from_pretrained(model_path(name)))
        model = auto.from_pretrained(model_path(name), dtype=dtype)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise SteerError(f"model {name}: cannot be loaded ({cause(error)})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def log_probabilities(
    model: Any, completion: Completion, setting: Setting, steers: Mapping[str, Steer]
) -> torch.Tensor:
    """The reference's log-probabilities ``[tokens, vocab]`` at each generated token."""
    ids = torch.tensor([[*completion.prompt, *completion.tokens]], device=model.device)
    with hf.steered(model, setting, steers, prompt_length=len(completion.prompt)):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(completion.prompt) - 1 : -1].float().log_softmax(-1).cpu()


def compare_with_reference(
    model: Any,
    completions: Sequence[Completion],
    steers: Mapping[str, Steer],
    *,
    steered: bool = True,
) -> ReferenceComparison:
    """Compare completions with the reference, under their own settings or unsteered."""
    differences, shortfalls, agreements = [], [], []
    for completion in completions:
        log_probs = log_probabilities(
            model, completion, completion.setting if steered else {}, steers
        )
        tokens = torch.tensor(completion.tokens)
        token_log_probs = log_probs.gather(1, tokens[:, None])[:, 0]
        differences.append((token_log_probs - torch.tensor(completion.logprobs)).abs())
        shortfalls.append(log_probs.max(-1).values - token_log_probs)
        agreements.append((log_probs.argmax(-1) == tokens).float())
    return ReferenceComparison(
        difference=float(torch.cat(differences).max()),
        shortfall=float(torch.cat(shortfalls).max()),
        agreement=float(torch.cat(agreements).mean()),
    )
