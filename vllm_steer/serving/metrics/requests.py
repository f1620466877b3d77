"""Counters of requests and tokens, by steer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from vllm_steer.config import NO_STEER
from vllm_steer.serving.metrics.labels import bounded_label

if TYPE_CHECKING:
    from prometheus_client import Counter

Status = Literal["finished", "aborted", "failed"]
"""``finished``: at its end, by length or by a stop; ``aborted``: by the client or the operator;
``failed``: by an error of the engine.
"""


@dataclass(frozen=True)
class RequestMetrics:
    """One set for a process, whatever the number of its engines."""

    requests: "Counter"
    steered_requests: "Counter"
    prompt_tokens: "Counter"
    generation_tokens: "Counter"


@cache
def request_metrics() -> RequestMetrics:
    """The process's counters, registered when its first steered engine starts."""
    from prometheus_client import Counter

    return RequestMetrics(
        Counter(
            "vllm_steer_requests",
            "Ended requests, under each of their steers; 'none': without a steer",
            ["steer", "status"],
        ),
        Counter("vllm_steer_steered_requests", "Ended requests with any steer", ["status"]),
        Counter(
            "vllm_steer_prompt_tokens",
            "Prompt tokens of ended requests, under each of their steers",
            ["steer"],
        ),
        Counter(
            "vllm_steer_generation_tokens",
            "Generated tokens of ended requests, under each of their steers",
            ["steer"],
        ),
    )


def prepare_series(steers: Iterable[str]) -> None:
    """Make the series of these steers and of ``none``, at 0, so that a rate sees their first
    request.
    """
    for status in get_args(Status):
        request_metrics().steered_requests.labels(status)
    for steer in (NO_STEER, *steers):
        label = bounded_label(steer)
        for status in get_args(Status):
            _requests(label, status)
        _tokens(label)


def count_request(
    labels: Sequence[str], status: Status, *, num_prompt_tokens: int, num_generated_tokens: int
) -> None:
    """Count one ended request under each of its label values (``labels.steer_labels``)."""
    if tuple(labels) != (NO_STEER,):
        request_metrics().steered_requests.labels(status).inc()
    for label in labels:
        _requests(label, status).inc()
        prompt_tokens, generation_tokens = _tokens(label)
        prompt_tokens.inc(num_prompt_tokens)
        generation_tokens.inc(num_generated_tokens)


@cache
def _requests(label: str, status: Status) -> "Counter":
    """Cached: finding a label costs as much as counting."""
    return request_metrics().requests.labels(label, status)


@cache
def _tokens(label: str) -> "tuple[Counter, Counter]":
    metrics = request_metrics()
    return metrics.prompt_tokens.labels(label), metrics.generation_tokens.labels(label)
