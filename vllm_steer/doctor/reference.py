"""Scores the engine's output with Hugging Face, by teacher forcing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_steer import hf
from vllm_steer.doctor.engine_process import Completion
from vllm_steer.errors import SteerError, cause
from vllm_steer.hf.language_model import auto_class
from vllm_steer.models import model_path
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class Scores:
    """A reference's log-probabilities of a completion's tokens, and of its own choices, and whether
    they are the same tokens.
    """

    tokens: torch.Tensor
    choices: torch.Tensor
    is_choice: torch.Tensor


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
    """Load the reference model, on a GPU if there is one that holds it. Raises ``SteerError`` if
    that fails.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        auto = auto_class(AutoConfig.from_pretrained(model_path(name)))
        model = auto.from_pretrained(model_path(name), dtype=dtype)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise SteerError(f"model {name}: cannot be loaded ({cause(error)})") from error
    return model.to("cuda" if _fits_on_gpu(model) else "cpu").eval()


def _fits_on_gpu(model: Any) -> bool:
    """Whether there is a GPU with room for the weights and as much as half of them again."""
    if not torch.cuda.is_available():
        return False
    size = sum(parameter.nbytes for parameter in model.parameters())
    return bool(1.5 * size < torch.cuda.mem_get_info()[0])


@torch.no_grad()
def score(
    model: Any, completion: Completion, steers: Mapping[str, Steer], *, steered: bool = True
) -> Scores:
    """The reference's scores of a completion, under its own setting or unsteered."""
    ids = torch.tensor([[*completion.prompt, *completion.tokens]], device=model.device)
    setting = completion.setting if steered else {}
    with hf.steered(model, setting, steers, prompt_length=len(completion.prompt)):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    log_probs = logits[len(completion.prompt) - 1 : -1].float().log_softmax(-1).cpu()
    tokens = torch.tensor(completion.tokens)
    choices, best = log_probs.max(-1)
    return Scores(log_probs.gather(1, tokens[:, None])[:, 0], choices, best == tokens)


def compare_with_reference(
    completions: Sequence[Completion], scores: Sequence[Scores]
) -> ReferenceComparison:
    """Compare an engine's completions with the reference's scores of them."""
    differences = [
        (one.tokens - torch.tensor(completion.logprobs)).abs()
        for completion, one in zip(completions, scores, strict=True)
    ]
    return ReferenceComparison(
        difference=float(torch.cat(differences).max()),
        shortfall=float(torch.cat([one.choices - one.tokens for one in scores]).max()),
        agreement=float(torch.cat([one.is_choice for one in scores]).float().mean()),
    )


def largest_difference(scores: Sequence[Scores], others: Sequence[Scores]) -> float:
    """The largest difference of a token's log-probability between two references."""
    pairs = zip(scores, others, strict=True)
    return max(float((one.tokens - other.tokens).abs().max()) for one, other in pairs)
