"""dPPL: the cost of steering, relative to the model's own answers to prompts with demonstrations.

With ``g`` the model's greedy answer to a prompt with demonstrations (ICL), including its
end-of-text token, ``q`` the same prompt without demonstrations, and ``a`` the strengths:

    PPL_icl     = exp(mean_t -ln p(g_t | icl prompt, g_<t))               unsteered
    PPL_steered = exp(mean_t -ln p_a(g_t | q, g_<t))                      teacher forcing
    dPPL        = PPL_steered - PPL_icl

For a dynamic steer, ``a`` are the strengths of its own free generation from ``q``, and the mean is
over the first ``min(|g|, |a|)`` tokens. Mean and median are over the examples whose ``g`` has all
the properties, as in the authors' plots. The median is the robust figure: a few answers that are
very improbable under steering dominate the mean.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), section 4, and the authors' code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vllm_steer import hf
from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Strengths
from vllm_steer.evaluation.means import mean
from vllm_steer.hf.language_model import text_config
from vllm_steer.models import LanguageModel
from vllm_steer.steers import Steer
from vllm_steer.texts import read_rows, take, text_of
from vllm_steer.texts.icl import icl_prompts, read_examples


@dataclass(frozen=True)
class PromptPair:
    """A prompt with demonstrations of the properties, and the same prompt without them."""

    icl: str
    plain: str


@dataclass(frozen=True)
class GoldAnswer:
    """The model's own answer to a prompt with demonstrations."""

    tokens: tuple[int, ...]
    text: str
    perplexity: float


def read_icl(path: Path, demonstrations: int, instruction: str) -> list[PromptPair]:
    """Read prompt pairs from rows with ``icl`` and ``prompt``, or with ``input`` and ``output``.

    Inputs and outputs are grouped as in ``texts.icl``; the prompt without demonstrations is
    ``Q:{input}\\nA:``, without an instruction. Raises ``SteerError`` for invalid or too few rows.
    """
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise SteerError(f"{path}: the file has no rows")
    if "icl" in first.values:
        rows = read_rows(path)
        return list(take(rows, lambda row: PromptPair(text_of(row, "icl"), text_of(row, "prompt"))))
    examples = read_examples(path)
    questions = examples[demonstrations :: demonstrations + 1]
    prompts = icl_prompts(examples, demonstrations, instruction=instruction)
    return [
        PromptPair(icl, f"Q:{question.input}\nA:")
        for icl, question in zip(prompts, questions, strict=True)
    ]


@torch.no_grad()
def gold_answer(language: LanguageModel, example: PromptPair, max_tokens: int) -> GoldAnswer:
    """The greedy answer of at most ``max_tokens`` tokens; ``SteerError`` if it cannot fit."""
    model = language.model
    tokens = torch.tensor([_encode(language, example.icl, max_tokens)], device=model.device)
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": 1}
    row = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0]
    answer = tuple(row[tokens.shape[1] :].tolist())
    text = language.tokenizer.decode(answer, skip_special_tokens=True)
    return GoldAnswer(answer, text, _perplexity(nll(language, example.icl, answer)))


@torch.no_grad()
def nll(language: LanguageModel, prompt: str, answer: Sequence[int]) -> torch.Tensor:
    """``-ln p`` of each token of an answer given a prompt, ``[tokens]`` float64, in one forward
    pass.

    The log-softmax is computed in float32, or in float64 for a float64 model.
    """
    prompt_tokens = _encode(language, prompt, len(answer))
    tokens = torch.tensor([[*prompt_tokens, *answer]], device=language.model.device)
    logits = language.model(input_ids=tokens, use_cache=False).logits[
        0, len(prompt_tokens) - 1 : -1
    ]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs: torch.Tensor = wide.log_softmax(-1).gather(
        -1, tokens[0, len(prompt_tokens) :, None]
    )[:, 0]
    return log_probs.double().neg().cpu()


def steered_perplexity(
    language: LanguageModel,
    example: PromptPair,
    gold: GoldAnswer,
    steer: Mapping[str, Any],
    steers: Mapping[str, Steer],
    strengths: Strengths | None = None,
) -> float:
    """``PPL_steered`` of one example; ``strengths`` are the dynamic ones of its free generation.

    NaN if the answer or the free generation has no token.
    """
    dynamic = strengths or {}
    length = min([len(gold.tokens), *map(len, dynamic.values())])
    if not length:
        return math.nan
    doses = {name: _forced_dose(dose, dynamic.get(name)) for name, dose in steer.items()}
    prompt_length = len(_encode(language, example.plain, length))
    with hf.steered(language.model, doses, steers, prompt_length=prompt_length):
        return _perplexity(nll(language, example.plain, gold.tokens[:length]))


def figures(
    steered: Sequence[float], golds: Sequence[GoldAnswer], has_properties: Sequence[bool]
) -> dict[str, Any]:
    """``mean`` and ``median`` of dPPL over the examples with the properties; NaN without any."""
    pairs = zip(steered, golds, has_properties, strict=True)
    differences = [value - gold.perplexity for value, gold, is_counted in pairs if is_counted]
    numbers = [value for value in differences if not math.isnan(value)]
    return {
        "mean": mean(numbers),
        "median": median(numbers) if numbers else math.nan,
        "examples": len(numbers),
        "of": len(golds),
    }


def _forced_dose(dose: Mapping[str, Any], strengths: Sequence[float] | None) -> dict[str, Any]:
    """A dose for ``hf.steered``: a dynamic strength becomes the list of its recorded strengths."""
    if strengths is None:
        return dict(dose)
    layers = {"layers": dose["layers"]} if "layers" in dose else {}
    return {"strength": list(strengths), **layers}


def _encode(language: LanguageModel, prompt: str, answer_length: int) -> list[int]:
    tokens: list[int] = language.tokenizer(prompt)["input_ids"]
    max_length = getattr(text_config(language.model), "max_position_embeddings", None)
    if not tokens or (max_length is not None and len(tokens) + answer_length > max_length):
        raise SteerError(
            f"prompt {prompt[:60]!r} has {len(tokens)} tokens; with {answer_length} answer tokens "
            f"it must fit the {max_length} of {language.name}; give fewer demonstrations"
        )
    return tokens


def _perplexity(costs: torch.Tensor) -> float:
    value = float(costs.mean()) if len(costs) else math.nan
    return math.inf if value > 700 else math.exp(value)
