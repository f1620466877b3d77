"""``/metrics`` of a server with two API servers, compared with the requests that it was sent."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import BASE, PROMPT
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.matrix

Samples = dict[tuple[str, ...], float]
NUM_TOKENS = 5
SETTLE_S = 90.0
NUM_GONE = 64
ASKED: tuple[tuple[Any, tuple[str, ...], int], ...] = (
    ("a:2", ("a",), 8),
    ("a:2,v:1", ("a", "v"), 6),
    (None, ("none",), 5),
    ("friendly", ("a",), 4),
    ("c:-1", ("c",), 3),
    ("v:dynamic:1", ("v",), 4),
)
"""The steer of a request, what it counts under, and how many there are of it."""


@pytest.fixture(scope="module")
def url(
    serve_with: Callable[[Path, Sequence[str]], AbstractContextManager[str]],
    steer_config: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("metrics") / "serve.log"
    options = [
        f"--steer-config={steer_config}",
        f"--served-model-name={BASE}",
        "--api-server-count=2",
    ]
    with serve_with(log, options) as url:
        yield url


def samples(url: str) -> Samples:
    """All samples by name and label values, of any one API server: it reports those of both."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def steer_counts(samples: Samples) -> Samples:
    prefix = "vllm_steer_"
    return {
        (name.removeprefix(prefix), *labels): value
        for (name, *labels), value in samples.items()
        if name.startswith(prefix) and name.endswith("_total")
    }


def total(samples: Samples, name: str) -> float:
    return sum(value for (found, *_), value in samples.items() if found == name)


def complete(url: str, steer: Any) -> dict[str, int]:
    """The usage of one request, on a connection of its own: any of the API servers takes it."""
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    if steer is not None:
        body["steer"] = steer
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    usage: dict[str, int] = answer.json()["usage"]
    return usage


def test_counts_are_those_of_the_requests_that_were_sent(url: str) -> None:
    before = samples(url)
    steers = [steer for steer, _, number in ASKED for _ in range(number)]
    with ThreadPoolExecutor(8) as pool:
        usages = list(pool.map(lambda steer: complete(url, steer), steers))
    labels = [labels for _, labels, number in ASKED for _ in range(number)]
    expected: Counter[tuple[str, ...]] = Counter()
    for usage, under in zip(usages, labels, strict=True):
        for steer in under:
            expected["requests_total", "status=finished", f"steer={steer}"] += 1
            expected["prompt_tokens_total", f"steer={steer}"] += usage["prompt_tokens"]
            expected["generation_tokens_total", f"steer={steer}"] += usage["completion_tokens"]
        expected["steered_requests_total", "status=finished"] += under != ("none",)
    expected["dynamic_requests_total",] = 4
    expected["dynamic_tokens_total",] = 4 * NUM_TOKENS
    after = samples(url)
    old, new = steer_counts(before), steer_counts(after)
    grown = {key: value - old.get(key, 0) for key, value in new.items()}
    clipped = "dynamic_clipped_tokens_total"
    assert {k: v for k, v in grown.items() if v and k[0] != clipped} == dict(expected)
    vllms = {
        "vllm:request_success_total": len(usages),
        "vllm:prompt_tokens_total": sum(usage["prompt_tokens"] for usage in usages),
        "vllm:generation_tokens_total": sum(usage["completion_tokens"] for usage in usages),
    }
    assert {name: total(after, name) - total(before, name) for name in vllms} == vllms


def test_both_api_servers_report_the_same_counts(url: str) -> None:
    assert len({tuple(sorted(steer_counts(samples(url)).items())) for _ in range(20)}) == 1


def ended(url: str, steer: str) -> dict[str, float]:
    """By status, the requests of a steer that have ended."""
    counts = steer_counts(samples(url))
    return {
        status: counts["requests_total", f"status={status}", f"steer={steer}"]
        for status in ("finished", "aborted", "failed")
    }


def test_a_client_that_goes_away_counts_as_aborted(url: str) -> None:
    """Each sequence is served as three with dynamic strength: most are waiting when it leaves."""
    before = ended(url, "v")
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "stream": True}
    body |= {"n": NUM_GONE, "temperature": 1, "steer": "v:dynamic:1"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + SETTLE_S
    grown: dict[str, float] = {}
    while sum(grown.values()) < NUM_GONE and time.monotonic() < deadline:
        grown = {status: count - before[status] for status, count in ended(url, "v").items()}
        time.sleep(0.1)
    assert grown["aborted"] + grown["finished"] == NUM_GONE
    assert grown["aborted"] >= NUM_GONE / 2


def test_series_of_steers_that_nobody_asked_for_are_there(url: str) -> None:
    assert steer_counts(samples(url))["requests_total", "status=finished", "steer=d"] == 0
