"""Greedy answers of servers with log probabilities, and checks of them.

The checks compare log probabilities and not tokens: under dummy weights the most likely token can
be the same for every hidden state.
"""

import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

ANSWER_TOKENS = 8
PROMPT_LENGTHS = (1, 7, 33)
ASK_LIMIT_S = 300.0


class ServedAnswer(NamedTuple):
    """The tokens of one request and the log probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def prompts(vocab_size: int) -> list[list[int]]:
    """Some prompts of token ids, the same in every call."""
    return [
        [1 + (97 * row + 31 * i) % (vocab_size - 2) for i in range(length)]
        for row, length in enumerate(PROMPT_LENGTHS)
    ]


def ask_all(url: str, model: str, vocab_size: int) -> list[ServedAnswer]:
    """The answers to ``prompts``, in sequence: a request alone in its batch is repeatable."""
    return [answer_of(post(url, completion_body(model, p))) for p in prompts(vocab_size)]


def completion_body(model: str, prompt: Sequence[int]) -> dict[str, Any]:
    """A greedy request of a fixed length that returns token ids and log probabilities."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def answer_of(response: dict[str, Any]) -> ServedAnswer:
    """The answer in the response to a ``completion_body``."""
    logprobs = response["choices"][0]["logprobs"]
    tokens = tuple(int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
    return ServedAnswer(tokens, tuple(logprobs["token_logprobs"]))


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a completion request to the server at ``url``."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=ASK_LIMIT_S) as response:
        return dict(json.load(response))


def check_equal(stock: Sequence[ServedAnswer], plugin: Sequence[ServedAnswer], what: str) -> None:
    """Check that unsteered answers equal those of stock vLLM in every token and every bit of a
    logprob.
    """
    for index, (expected, actual) in enumerate(_pairs(stock, plugin, what)):
        assert actual == expected, f"{what}, prompt {index}: {actual}; stock vLLM gives {expected}"


def check_effect(
    unsteered: Sequence[ServedAnswer], steered: Sequence[ServedAnswer], what: str
) -> None:
    """Check that every steered answer differs from the unsteered one."""
    for index, (plain, answer) in enumerate(_pairs(unsteered, steered, what)):
        assert answer != plain, f"{what}, prompt {index}: the steer had no effect"


def _pairs(
    expected: Sequence[ServedAnswer], actual: Sequence[ServedAnswer], what: str
) -> Iterator[tuple[ServedAnswer, ServedAnswer]]:
    assert len(expected) == len(actual) > 0, f"{what}: {len(actual)} answers for {len(expected)}"
    for answer in actual:
        assert all(map(math.isfinite, answer.logprobs)), f"{what}: not finite: {answer.logprobs}"
    return zip(expected, actual, strict=True)
