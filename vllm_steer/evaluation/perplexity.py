"""Perplexity of continuations given their prompts, by another language model.

With ``L(x)`` the negative log-likelihood of all tokens of a text but the first, ``n(x)`` the number
of all its tokens, ``p`` a prompt and ``g`` its continuation:

    ppl = exp((L(p + g) - L(p)) / (n(p + g) - n(p)))

Prompt and continuation are tokenised as one text, and the prompt also alone. If the tokenizer adds
a beginning-of-text token, it adds it to both, and that token is not scored. GPT-2's tokenizer adds
none, so ``L(p)`` is undefined for a prompt of one token, and so is the perplexity after it.

Source: Han et al., ACL 2024 (arXiv 2305.12798), as in the authors' evaluation script.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean
from vllm_steer.hf.language_model import text_config
from vllm_steer.models import LanguageModel

OUTLIER: Final = 1e4
"""The authors' mean excludes perplexities from this value on."""

_LOGITS: Final = 1 << 25  # maximum logits per batch, except for a single longer text
_LARGEST_EXPONENT: Final = 700.0


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a continuation, in nats, and its number of tokens."""

    nll: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(nll / num_tokens)``; NaN if undefined."""
        return _exp(self.nll / self.num_tokens) if self.num_tokens > 0 else math.nan


@dataclass(frozen=True)
class PerplexityJudge:
    """Perplexity of the continuations by a model; the module's docstring defines it.

    The model moves to ``device`` (None: a GPU if there is one) at its first use, so that it takes
    no GPU memory from an engine that runs before.
    """

    name: str
    judge: LanguageModel
    device: str | None = None
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """The figures of ``summary``, with a log-softmax in float32, or float64 for a float64
        model.

        Raises ``SteerError`` for a text longer than the model's maximum.
        """
        self.judge.model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return summary(likelihoods(self.judge, answers))


def summary(values: Sequence[Likelihood]) -> dict[str, float]:
    """Summary statistics of the perplexities of all texts.

    ``perplexity`` is the authors' mean of the perplexities below 1e4; ``dropped`` is the share of
    texts that this mean excludes (outliers and undefined perplexities). ``median`` and
    ``total_perplexity = exp(sum of nll / sum of tokens)`` include the outliers.
    """
    scored = [likelihood for likelihood in values if not math.isnan(likelihood.perplexity)]
    inliers = [likelihood.perplexity for likelihood in scored if likelihood.perplexity < OUTLIER]
    if not scored:
        return dict.fromkeys(("perplexity", "median", "total_perplexity"), math.nan) | {
            "dropped": 1.0 if values else math.nan
        }
    return {
        "perplexity": mean(inliers),
        "dropped": 1 - len(inliers) / len(values),
        "median": median(likelihood.perplexity for likelihood in scored),
        "total_perplexity": _exp(
            math.fsum(likelihood.nll for likelihood in scored)
            / sum(likelihood.num_tokens for likelihood in scored)
        ),
    }


def likelihoods(judge: LanguageModel, answers: Sequence[Answers]) -> list[Likelihood]:
    """The likelihood of each continuation given its prompt, in the order of the answers.

    NaN for a continuation that adds no token, and after a prompt of one token other than the
    beginning-of-text token.
    """
    prompts = _encode(judge, [answer.prompt for answer in answers])
    texts = _encode(judge, [answer.prompt + text for answer in answers for text in answer.texts])
    nll = text_nll(judge.model, [*prompts, *texts])
    bos_only = [judge.tokenizer.bos_token_id]
    prompt_nll = [0.0 if row == bos_only else cost for row, cost in zip(prompts, nll, strict=False)]
    prompt_indices = [index for index, answer in enumerate(answers) for _ in answer.texts]
    return [
        Likelihood(cost - prompt_nll[index], len(row) - len(prompts[index]))
        for index, row, cost in zip(prompt_indices, texts, nll[len(prompts) :], strict=True)
    ]


@torch.no_grad()
def text_nll(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """``-sum_t>0 log p(x_t | x_<t)`` of each row of token ids; NaN for fewer than two tokens.

    Rows are padded on the right, which causal attention never reads. The log-softmax is computed in
    float32 (float64 for a float64 model), the sum in float64.
    """
    costs = [math.nan] * len(rows)
    for batch in _batches(rows, text_config(model).vocab_size):
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[index]) for index in batch], True, padding_value=0
        ).to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        cost = torch.nn.functional.cross_entropy(
            wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
        for index, row in zip(batch, cost.double().cpu(), strict=True):
            costs[index] = row[: len(rows[index]) - 1].sum().item()
    return costs


def _batches(rows: Sequence[Sequence[int]], vocab_size: int) -> Iterator[list[int]]:
    """Indices of the rows of at least two tokens, longest first, in batches of limited logits."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True):
        if len(rows[index]) < 2:
            continue
        if batch and (len(batch) + 1) * len(rows[batch[0]]) * vocab_size > _LOGITS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _encode(judge: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    rows: list[list[int]] = judge.tokenizer(list(texts))["input_ids"] if texts else []
    limit = getattr(text_config(judge.model), "max_position_embeddings", None)
    for row, text in zip(rows, texts, strict=True):
        if limit is not None and len(row) > limit:
            raise SteerError(
                f"text {text[:60]!r} has {len(row)} tokens; the maximum of {judge.name} is "
                f"{limit}; use shorter texts or another judge"
            )
    return rows


def _exp(value: float) -> float:
    return math.inf if value > _LARGEST_EXPONENT else math.exp(value)
