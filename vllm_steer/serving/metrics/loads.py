"""Metrics and log lines of steers that are loaded and unloaded while the server runs.

One process counts and logs a load: the API server that was asked. ``set_slots`` is called in every
one of them, with the same numbers.
"""

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, get_args

from vllm_steer.untrusted_text import LONGEST, printable

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

logger = logging.getLogger("vllm.vllm_steer")

Outcome = Literal["loaded", "replaced", "refused"]

SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PLAIN: Final = re.compile(r"[\w.+\-/:@]+", re.ASCII)


@dataclass(frozen=True)
class LoadMetrics:
    """One set for a process."""

    loads: "Counter"
    seconds: "Histogram"
    unloads: "Counter"
    slots_used: "Gauge"
    slots_reserved: "Gauge"


@cache
def load_metrics() -> LoadMetrics:
    """The process's metrics, registered when they are first set.

    Of the gauges ``/metrics`` shows the value that was set last, by whichever API server.
    """
    from prometheus_client import Counter, Gauge, Histogram

    return LoadMetrics(
        Counter("vllm_steer_loads", "Requests to load a steer, by outcome", ["outcome"]),
        Histogram(
            "vllm_steer_load_seconds",
            "Seconds from the request to load a steer until it can be used or is refused",
            buckets=SECONDS,
        ),
        Counter("vllm_steer_unloads", "Steers that were unloaded"),
        Gauge(
            "vllm_steer_slots_used",
            "Places for steers loaded at run time that hold one",
            ["kind"],
            multiprocess_mode="mostrecent",
        ),
        Gauge(
            "vllm_steer_slots_reserved",
            "Places that the config reserves for steers loaded at run time",
            ["kind"],
            multiprocess_mode="mostrecent",
        ),
    )


def prepare_load_series() -> None:
    """Make the series of loads, at 0, so that a rate sees the first one. For a server on which
    steers can be loaded.
    """
    for outcome in get_args(Outcome):
        load_metrics().loads.labels(outcome)


def count_load(outcome: Outcome, seconds: float) -> None:
    """Count one request to load a steer, and the seconds that it took."""
    load_metrics().loads.labels(outcome).inc()
    load_metrics().seconds.observe(seconds)


def count_unload() -> None:
    """Count one steer that was unloaded."""
    load_metrics().unloads.inc()


def set_slots(kind: str, used: int, total: int) -> None:
    """Set how many of the places that are reserved for a kind of steer hold one."""
    load_metrics().slots_used.labels(kind).set(used)
    load_metrics().slots_reserved.labels(kind).set(total)


def log_load(name: str, digest: str, source: str, seconds: float, outcome: Outcome) -> None:
    """Log a load in one line of ``key=value`` pairs; a refused one as a warning.

    ``digest`` is the content's, of which the first 12 digits are shown; empty if none was read.
    ``source`` says where the bytes came from: a path, or ``request``.
    """
    values = {
        "name": name,
        "digest": digest[:12],
        "source": source,
        "seconds": f"{seconds:.3f}",
        "outcome": outcome,
    }
    line = " ".join(f"{key}={_value(value)}" for key, value in values.items())
    logger.log(logging.WARNING if outcome == "refused" else logging.INFO, "steer_load %s", line)


def _value(text: str) -> str:
    """A value of a line: quoted unless it consists of plain characters, so that no value can pass
    for further pairs.
    """
    text = printable(text, LONGEST)
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
