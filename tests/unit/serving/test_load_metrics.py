"""Metrics and log lines of steers that are loaded at run time, also of several API servers."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_steer.serving.metrics import loads

WORKER = """
import sys
from vllm_steer.serving.metrics.loads import count_load, prepare_load_series, set_slots
from vllm_steer.serving.metrics.requests import count_request, prepare_series

requests, used = map(int, sys.argv[1:])
prepare_series(["a"])
prepare_load_series()
for _ in range(requests):
    count_request(["a", "b"], "finished", num_prompt_tokens=5, num_generated_tokens=7)
    count_load("loaded", 0.2)
set_slots("lm_steer", used, 8)
"""


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"vllm_steer_{name}", labels) or 0.0


def test_loads_are_counted_by_outcome_and_timed() -> None:
    before = {o: value("loads_total", outcome=o) for o in ("loaded", "replaced", "refused")}
    count, total = value("load_seconds_count"), value("load_seconds_sum")
    slow = value("load_seconds_bucket", le="30.0"), value("load_seconds_bucket", le="10.0")
    loads.count_load("loaded", 0.25)
    loads.count_load("loaded", 20.0)
    loads.count_load("refused", 0.5)
    grown = {o: value("loads_total", outcome=o) - before[o] for o in before}
    assert grown == {"loaded": 2, "replaced": 0, "refused": 1}
    assert value("load_seconds_count") - count == 3
    assert value("load_seconds_sum") - total == pytest.approx(20.75)
    assert value("load_seconds_bucket", le="30.0") - slow[0] == 3
    assert value("load_seconds_bucket", le="10.0") - slow[1] == 2


def test_unloads_are_counted() -> None:
    before = value("unloads_total")
    loads.count_unload()
    assert value("unloads_total") - before == 1


def test_slots_are_what_was_set_last() -> None:
    loads.set_slots("vector", 3, 32)
    loads.set_slots("vector", 2, 32)
    assert value("slots_used", kind="vector") == 2
    assert value("slots_reserved", kind="vector") == 32


def test_several_processes_add_up_counts_and_share_gauges(tmp_path: Path) -> None:
    for requests, used in ((2, 5), (1, 4)):  # one after the other: 4 was set last
        subprocess.run(
            [sys.executable, "-c", WORKER, str(requests), str(used)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            check=True,
            timeout=120,
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    expected = {
        ("requests_total", ("status", "finished"), ("steer", "a")): 3,
        ("requests_total", ("status", "aborted"), ("steer", "a")): 0,
        ("requests_total", ("status", "finished"), ("steer", "b")): 3,
        ("requests_total", ("status", "finished"), ("steer", "none")): 0,
        ("steered_requests_total", ("status", "finished")): 3,
        ("prompt_tokens_total", ("steer", "b")): 15,
        ("generation_tokens_total", ("steer", "a")): 21,
        ("loads_total", ("outcome", "loaded")): 3,
        ("loads_total", ("outcome", "refused")): 0,
        ("load_seconds_count",): 3,
        ("unloads_total",): 0,
        ("slots_used", ("kind", "lm_steer")): 4,
        ("slots_reserved", ("kind", "lm_steer")): 8,
    }
    found = {
        (name, *labels): registry.get_sample_value(f"vllm_steer_{name}", dict(labels))
        for name, *labels in expected
    }
    assert found == expected


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(loads.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.vllm_steer")
    return caplog


def test_a_load_is_one_line_of_keys_and_values(log: pytest.LogCaptureFixture) -> None:
    loads.log_load("detox", "0123456789abcdef", "/srv/steers/detox.safetensors", 0.1234, "loaded")
    assert log.messages == [
        "steer_load name=detox digest=0123456789ab source=/srv/steers/detox.safetensors "
        "seconds=0.123 outcome=loaded"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "x outcome=loaded",
        'x" outcome="loaded',
        "a\nsteer_load name=b",
        "a\x1b[31m",
        "",
        "\u202eabc",
    ],
    ids=["pair", "quote", "line", "escape", "empty", "direction"],
)
def test_a_hostile_name_stays_one_printable_value(log: pytest.LogCaptureFixture, name: str) -> None:
    loads.log_load(name, "", "request", 1.0, "refused")
    (line,) = log.messages
    assert line.isprintable()
    event, *pairs = shlex.split(line)
    assert event == "steer_load"
    assert [pair.partition("=")[0] for pair in pairs] == [
        *("name", "digest", "source", "seconds", "outcome")
    ]
    assert pairs[-1] == "outcome=refused"


def test_a_refused_load_is_a_warning(log: pytest.LogCaptureFixture) -> None:
    loads.log_load("a", "", "request", 1.0, "refused")
    loads.log_load("a", "0" * 64, "request", 1.0, "replaced")
    assert [record.levelname for record in log.records] == ["WARNING", "INFO"]
