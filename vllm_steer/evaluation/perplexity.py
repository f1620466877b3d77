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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers, OnText, ignore_count
from vllm_steer.evaluation.means import by_prompt, mean
from vllm_steer.hf.language_model import backbone, text_config
from vllm_steer.hf.lm_head import LMHead, head_difference, head_of
from vllm_steer.hf.sites import widened
from vllm_steer.models import LanguageModel

OUTLIER: Final = 1e4
"""The authors' mean excludes perplexities from this value on."""

# Maxima per batch, except for a single longer text: tokens, and logits without ``_plain_head``.
_TOKENS: Final = 1 << 11
_LOGITS: Final = 1 << 25
_ROUNDING: Final = 8  # multiples of the dtype's precision by which equal logits may differ
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
        """The figures of ``summary``, see ``observe``."""
        return self.figures(self.observe(answers))

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> list[list[Likelihood]]:
        """The likelihoods of each prompt's texts, with a log-softmax in float32, or in float64 for
        a float64 model.

        Raises ``SteerError`` for a text longer than the model's maximum.
        """
        self.judge.model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return by_prompt(likelihoods(self.judge, answers, on_text), answers)

    def figures(self, observations: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """The figures of ``summary`` over the texts of all prompts."""
        return summary([likelihood for texts in observations for likelihood in texts])


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


def likelihoods(
    judge: LanguageModel, answers: Sequence[Answers], on_text: OnText = ignore_count
) -> list[Likelihood]:
    """The likelihood of each continuation given its prompt, in the order of the answers.

    NaN for a continuation that adds no token, and after a prompt of one token other than the
    beginning-of-text token. Tokens that the prompt alone and the text begin with have the same
    likelihood in both and are not computed. ``on_text`` receives the number of texts done.
    """
    prompts = _encode(judge, [answer.prompt for answer in answers])
    texts = _encode(judge, [answer.prompt + text for answer in answers for text in answer.texts])
    indices = [index for index, answer in enumerate(answers) for _ in answer.texts]
    shared = [_shared(prompts[index], text) for index, text in zip(indices, texts, strict=True)]
    costs = text_nll(judge.model, texts, shared, on_text)
    prompt_costs = _prompt_costs(judge, prompts, set(zip(indices, shared, strict=True)))
    return [
        Likelihood(cost - prompt_costs[index, count], len(text) - len(prompts[index]))
        for index, count, text, cost in zip(indices, shared, texts, costs, strict=True)
    ]


def _prompt_costs(
    judge: LanguageModel, prompts: Sequence[Sequence[int]], used: Collection[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """By prompt and number ``g`` of its tokens that a text begins with: the cost of the others.

    It is 0 where the text begins with all of them, and after the beginning-of-text token alone.
    """
    pairs = sorted(used)
    costs = text_nll(judge.model, [prompts[index] for index, _ in pairs], [g for _, g in pairs])
    bos_only = [judge.tokenizer.bos_token_id]
    return {
        pair: 0.0 if prompts[pair[0]] == bos_only else cost
        for pair, cost in zip(pairs, costs, strict=True)
    }


@torch.no_grad()
def text_nll(
    model: Any,
    rows: Sequence[Sequence[int]],
    given: Sequence[int] | None = None,
    on_text: OnText = ignore_count,
) -> list[float]:
    """``-sum_{t >= max(g, 1)} log p(x_t | x_<t)`` of each row of token ids; NaN for fewer than two.

    ``given`` has the number of tokens ``g`` at the start of each row that are not scored; without
    it they are 0. Rows are padded on the right, which causal attention never reads. Logits are
    computed for scored tokens, a few at a time, so that their memory depends neither on the length
    of the texts nor on the vocabulary. The log-softmax is computed in float32 (float64 for a
    float64 model), the sum in float64.
    """
    firsts = [max(1, count) for count in given or [0] * len(rows)]
    costs = [math.nan if len(row) < 2 else 0.0 for row in rows]
    scored = [index for index, row in enumerate(rows) if len(row) > firsts[index]]
    on_text(len(rows) - len(scored))
    if not scored:
        return costs
    scored.sort(key=lambda index: len(rows[index]), reverse=True)
    head = _plain_head(model, rows[scored[0]])
    most_tokens = _TOKENS if head else _LOGITS // text_config(model).vocab_size
    done = len(rows) - len(scored)
    for batch in _batches(scored, rows, most_tokens):
        token_costs = _token_costs(
            model, head, [rows[index] for index in batch], [firsts[index] for index in batch]
        )
        for index, cost in zip(batch, token_costs, strict=True):
            costs[index] = cost.sum().item()
        on_text(done := done + len(batch))
    return costs


def _token_costs(
    model: Any, head: LMHead | None, rows: Sequence[Sequence[int]], firsts: Sequence[int]
) -> Sequence[torch.Tensor]:
    """The negative log-likelihoods of each row's tokens from its first on, float64 on the CPU."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True).to(model.device)
    if head is None:
        states = model(input_ids=tokens, use_cache=False).logits
    else:
        states = backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state
    counts = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
    spans = [slice(first - 1, len(row) - 1) for row, first in zip(rows, firsts, strict=True)]
    inputs = torch.cat([states[index, span] for index, span in enumerate(spans)])
    targets = torch.cat([tokens[index, 1:][span] for index, span in enumerate(spans)])
    size = len(inputs) if head is None else head.tokens_at_once
    costs = [
        torch.nn.functional.cross_entropy(
            _logits(head, inputs[start : start + size]),
            targets[start : start + size],
            reduction="none",
        )
        for start in range(0, len(inputs), size)
    ]
    return torch.split(torch.cat(costs).double().cpu(), counts)


def _logits(head: LMHead | None, states: torch.Tensor) -> torch.Tensor:
    """The logits in a wide dtype; without a head the states are the logits."""
    return widened(states) if head is None else head.finish(head.raw_logits(states))


def _plain_head(model: Any, row: Sequence[int]) -> LMHead | None:
    """The model's LM head, if its logits on a row's tokens are the model's up to rounding."""
    try:
        head = head_of(model)
        difference = head_difference(model, head, torch.tensor(row))
    except (SteerError, AttributeError):  # no plain head, or no plain backbone
        return None
    allowed = _ROUNDING * torch.finfo(head.weight.dtype).eps
    return head if difference <= allowed else None


def _batches(
    indices: Sequence[int], rows: Sequence[Sequence[int]], most_tokens: int
) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches of a limited number of tokens with padding."""
    batch: list[int] = []
    for index in indices:
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _shared(prompt: Sequence[int], text: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = zip(prompt, text, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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
