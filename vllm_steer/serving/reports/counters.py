"""Prometheus metrics of dynamic strength, on the registry that vLLM's ``/metrics`` serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from vllm_steer.serving.reports.record import Record

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

BUCKETS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0)
ROUNDING = 1e-6
"""Relative: strengths come as float32."""


@dataclass(frozen=True)
class Counters:
    """One set for a process, whatever the number of its engines."""

    requests: "Counter"
    tokens: "Counter"
    strength: "Histogram"
    at_maximum: "Counter"


@cache
def counters() -> Counters:
    """The process's counters, registered with the first strength that there is to count."""
    from prometheus_client import Counter, Histogram

    return Counters(
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


def count_token(strengths: Mapping[str, float], record: Record) -> None:
    """Count one token of the sequence that ``record`` belongs to."""
    found = counters()
    if not record.is_counted:
        record.is_counted = True
        found.requests.inc()
    found.tokens.inc()
    for steer, strength in strengths.items():
        histogram, at_maximum = _of_steer(steer)
        histogram.observe(abs(strength))
        maximum = record.maxima.get(steer)
        if maximum is not None and abs(strength) >= abs(maximum) * (1 - ROUNDING):
            at_maximum.inc()


@cache
def _of_steer(steer: str) -> "tuple[Histogram, Counter]":
    """Looked up once: finding a label costs as much as counting."""
    return counters().strength.labels(steer), counters().at_maximum.labels(steer)
