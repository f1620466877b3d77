"""A small run of the load against a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.changes import History
from benchmarks.soak.checks import Memory

ROOT = Path(__file__).parents[1]
REQUESTS = 300


@pytest.mark.matrix
def test_mixed_requests_while_steers_are_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak.run", f"--requests={REQUESTS}"]
    result = tmp_path / "soak.json"
    run = subprocess.run(
        [*command, "--json", str(result)], cwd=ROOT, capture_output=True, text=True, timeout=590
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["requests"], row["num_faults"], row["left_behind"]) == (REQUESTS, 0, {})
    assert sum(row["outcomes"].values()) == REQUESTS
    assert row["changes"]["load_steer 200"] > 4


def test_a_name_may_mean_what_it_meant_at_any_time_of_a_request() -> None:
    history = History({"a": [(0.0, 0.0, None), (1.0, 2.0, "x"), (5.0, 6.0, "y")]})
    spans = {(0.0, 0.5): {None}, (0.5, 1.5): {None, "x"}, (3.0, 4.0): {"x"}, (5.5, 9.0): {"x", "y"}}
    assert {span: history.possible("a", *span) for span in spans} == spans
    assert history.now("a") == "y"


@pytest.mark.parametrize(
    ("samples", "is_flat"),
    [([500.0] * 100, True), ([500.0 + n for n in range(100)], False), ([500.0, 540.0] * 50, True)],
    ids=["flat", "growing", "up and down"],
)
def test_memory_that_grows_is_not_flat(samples: list[float], is_flat: bool) -> None:
    memory = Memory(0)
    memory.samples["server 1"] = samples
    assert memory.growth()["server 1"]["is_flat"] is is_flat
