"""Prometheus metrics of dynamic strength, on the registry that vLLM's ``/metrics`` serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from vllm_steer.serving.metrics.labels import bounded_label

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

BUCKETS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0)
ROUNDING = 1e-6
"""Relative: strengths come as float32."""


@dataclass(frozen=True)
class Metrics:
    """One set for a process, whatever the number of its engines."""

    requests: "Counter"
    tokens: "Counter"
    strength: "Histogram"
    at_maximum: "Counter"


@cache
def metrics() -> Metrics:
    """The process's metrics, registered when the first strength is counted."""
    from prometheus_client import Counter, Histogram

    return Metrics(
        Counter("vllm_steer_dynamic_requests", "Sequences served with dynamic strength"),
        Counter("vllm_steer_dynamic_tokens", "Tokens generated with dynamic strength"),
        Histogram(
            "vllm_steer_dynamic_strength",
            "Magnitude of a steer's dynamic strength at a token",
            ["steer"],
            buckets=BUCKETS,
        ),
        Counter(
            "vllm_steer_dynamic_clipped_tokens",
            "Tokens at which a steer's dynamic strength was the request's maximum",
            ["steer"],
        ),
    )


def count_sequence() -> None:
    """Count one sequence with dynamic strength."""
    metrics().requests.inc()


def count_token(strengths: Mapping[str, float], maxima: Mapping[str, float]) -> None:
    """Count one token, by steer its strength and the maximum, where that is known."""
    metrics().tokens.inc()
    for steer, strength in strengths.items():
        histogram, at_maximum = _of_steer(steer)
        histogram.observe(abs(strength))
        maximum = maxima.get(steer)
        if maximum is not None and abs(strength) >= abs(maximum) * (1 - ROUNDING):
            at_maximum.inc()


@cache
def _of_steer(steer: str) -> "tuple[Histogram, Counter]":
    """Cached: finding a label costs as much as counting."""
    label = bounded_label(steer)
    return metrics().strength.labels(label), metrics().at_maximum.labels(label)
