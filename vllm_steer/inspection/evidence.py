"""The evidence of a text for a steer, by token and by span.

    evidence_t = log p_{+v}(x_t | x_<t) - log p_{-v}(x_t | x_<t),  t = 1 .. n-1

from two forward passes, at strengths ``+v`` and ``-v``; fixed columns are applied with 1 in both.
The first token is not predicted and has no evidence. The sign of the sum classifies the text.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 5, for LM-Steers; the equation applies to a steer of any kind.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_steer import hf
from vllm_steer.errors import SteerError
from vllm_steer.hf.language_model import text_config
from vllm_steer.hf.sites import widened
from vllm_steer.inspection.spans import best_spans
from vllm_steer.models import LanguageModel
from vllm_steer.steers import ConditionSteer, Steer


@dataclass(frozen=True)
class TextSpan:
    """A span of a text with its evidence in nats.

    ``begin`` and ``end`` are character offsets, ``end`` excluded; ``first_token`` and
    ``last_token`` are token indices, both included.
    """

    begin: int
    end: int
    text: str
    first_token: int
    last_token: int
    evidence: float


@dataclass(frozen=True)
class Evidence:
    """The evidence of a text for a steer at strengths +v and -v.

    ``tokens`` has the evidence of each token but the first, in nats.
    """

    text: str
    strength: float
    tokens: tuple[float, ...]
    spans_for: tuple[TextSpan, ...]
    spans_against: tuple[TextSpan, ...]

    @property
    def total(self) -> float:
        """The log-likelihood ratio of the text at +v and -v, in nats."""
        return math.fsum(self.tokens)

    @property
    def label(self) -> int:
        """1 if the text is likelier at +v, -1 if it is likelier at -v, else 0."""
        return (self.total > 0) - (self.total < 0)


def text_evidence(
    model: LanguageModel,
    steer: Steer,
    text: str,
    *,
    strength: float = 1.0,
    spans: int = 4,
    longest: int = 10,
) -> Evidence:
    """The evidence of a text by token, and at most ``spans`` strongest spans for and against the
    steer.

    The text is tokenised with special tokens and steered as by ``hf.steered``; a step delta starts
    at the first token. Spans have at most ``longest`` tokens.

    Raises ``SteerError`` for a strength of 0, a text of fewer than two tokens or more than the
    model's maximum, a tokenizer without character offsets, and a steer that does not fit the model.
    """
    ids, offsets = _encode(model, text)
    values = token_evidence(model.model, steer, ids, strength=strength).tolist()
    sides = []
    for sign in (1.0, -1.0):
        best = best_spans([sign * value for value in values], spans=spans, longest=longest)
        # Evidence begins at token 1: values[t] belongs to token t + 1.
        sides.append(
            tuple(_in_text(text, offsets, s.begin + 1, s.end, sign * s.total) for s in best)
        )
    return Evidence(text, strength, tuple(values), sides[0], sides[1])


@torch.no_grad()
def token_evidence(model: Any, steer: Steer, ids: torch.Tensor, *, strength: float) -> torch.Tensor:
    """The evidence ``[tokens - 1]`` of token ids ``[tokens]``, in float32, or the model's float64.

    Raises ``SteerError`` for a strength that is 0 or not finite, and for a condition.
    """
    if isinstance(steer, ConditionSteer):
        raise SteerError(
            "a condition changes no likelihood, so a text is no evidence for it; give the steer "
            "whose requests name it"
        )
    if strength == 0 or not math.isfinite(strength):
        raise SteerError(
            f"strength is {strength:g}: the two likelihoods would be equal or undefined; give a "
            "finite strength other than 0"
        )
    above, below = (_log_likelihoods(model, steer, ids, v) for v in (strength, -strength))
    return above - below


def _log_likelihoods(model: Any, steer: Steer, ids: torch.Tensor, strength: float) -> torch.Tensor:
    """``log p(x_t | x_<t) [tokens - 1]`` under a steer."""
    tokens = ids.to(model.device)[None]
    with hf.steered(model, {"steer": strength}, {"steer": steer}, prompt_length=1):
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    wide = widened(logits)
    token_logits = wide.gather(1, tokens[0, 1:, None])[:, 0]
    return token_logits - wide.logsumexp(dim=1)


def _encode(model: LanguageModel, text: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Token ids ``[tokens]`` and the character offsets of each."""
    if not model.tokenizer.is_fast:
        raise SteerError(
            f"model {model.name}: its tokenizer does not report the offsets of its tokens; "
            "expected a model with a fast tokenizer"
        )
    encoded = model.tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    if len(ids) < 2:
        raise SteerError(
            f"the text {text!r:.50} has {len(ids)} tokens; the first has no evidence; expected at "
            "least two"
        )
    max_length = getattr(text_config(model.model), "max_position_embeddings", None)
    if max_length is not None and len(ids) > max_length:
        raise SteerError(
            f"the text {text!r:.50} has {len(ids)} tokens and the maximum of model "
            f"{model.name} is {max_length}; split the text"
        )
    return torch.tensor(ids), encoded["offset_mapping"]


def _in_text(
    text: str, offsets: list[tuple[int, int]], first: int, last: int, total: float
) -> TextSpan:
    """The span of tokens ``first`` to ``last``, without white space at its ends."""
    spanned = [offset for offset in offsets[first : last + 1] if offset[0] < offset[1]]
    begin, end = (spanned[0][0], spanned[-1][1]) if spanned else (0, 0)
    part = text[begin:end]
    begin += len(part) - len(part.lstrip())
    return TextSpan(begin, begin + len(part.strip()), part.strip(), first, last, total)
