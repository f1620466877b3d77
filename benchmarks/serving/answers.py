"""What servers and engines answer, greedily and with log probabilities, and what must hold of it.

Log probabilities and not tokens show that a steer had its effect: under dummy weights the
likeliest token can be the same whatever the hidden state.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment
from benchmarks.engines import greedy, make_engine

ANSWER_TOKENS = 8
PROMPT_LENGTHS = (1, 7, 33)
ASK_LIMIT_S = 300.0


class Answer(NamedTuple):
    """The tokens of one request and the log probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def prompts(vocab_size: int) -> list[list[int]]:
    """Token ids of some prompts, the same in every call."""
    return [
        [1 + (97 * row + 31 * i) % (vocab_size - 2) for i in range(length)]
        for row, length in enumerate(PROMPT_LENGTHS)
    ]


def ask_all(url: str, model: str, vocab_size: int) -> list[Answer]:
    """The answers to ``prompts``, one after the other: alone in its batch each is repeatable."""
    return [answer_of(post(url, completion_body(model, p))) for p in prompts(vocab_size)]


def completion_body(model: str, prompt: Sequence[int]) -> dict[str, Any]:
    """A greedy request of a fixed length that is answered with token ids and log probabilities."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def answer_of(response: dict[str, Any]) -> Answer:
    """The answer in the response to a ``completion_body``."""
    logprobs = response["choices"][0]["logprobs"]
    tokens = tuple(int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
    return Answer(tokens, tuple(logprobs["token_logprobs"]))


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a completion request to the server at ``url``."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_LIMIT_S) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"HTTP {error.code}: {error.read().decode()}") from None


def of_engines(
    model: Path, vocab_size: int, options: dict[str, Any], configs: dict[str, dict[str, Any]]
) -> dict[str, list[Answer]]:
    """The answers of engines in this process to ``prompts``, each alone in its batch: of stock
    vLLM, and by the name of each config of requests that do not ask for a steer, and that ask for
    none.
    """
    environment.set_defaults()
    engines = {"stock": make_engine(model, plugin=False, **options)}
    engines |= {name: make_engine(model, config, **options) for name, config in configs.items()}
    asked = prompts(vocab_size)
    found = {name: [_of_engine(llm, p, None) for p in asked] for name, llm in engines.items()}
    for name in configs:
        found[f"{name}, none"] = [_of_engine(engines[name], p, "none") for p in asked]
    return found


def _of_engine(llm: Any, prompt: list[int], steer: str | None) -> Answer:
    params = greedy(ANSWER_TOKENS, steer, logprobs=1)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    tokens, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs
    chosen = tuple(at[token].logprob for token, at in zip(tokens, logprobs, strict=True))
    return Answer(tuple(tokens), chosen)


def check_equal(stock: Sequence[Answer], found: Sequence[Answer], what: str) -> None:
    """An unsteered answer is that of stock vLLM, every token and every bit of its logprob."""
    assert len(stock) == len(found) > 0, f"{what}: {len(found)} answers for {len(stock)}"
    for index, (wanted, given) in enumerate(zip(stock, found, strict=True)):
        _check_finite(given, what)
        assert given == wanted, f"{what}, prompt {index}: {given}; stock vLLM gives {wanted}"


def check_effect(unsteered: Sequence[Answer], steered: Sequence[Answer], what: str) -> None:
    """Every steered answer differs from the unsteered one: what was timed did steer."""
    assert len(unsteered) == len(steered) > 0, f"{what}: {len(steered)} for {len(unsteered)}"
    for index, (plain, given) in enumerate(zip(unsteered, steered, strict=True)):
        _check_finite(given, what)
        assert given != plain, f"{what}, prompt {index}: the steer had no effect"


def _check_finite(answer: Answer, what: str) -> None:
    assert all(map(math.isfinite, answer.logprobs)), f"{what}: not finite: {answer.logprobs}"
