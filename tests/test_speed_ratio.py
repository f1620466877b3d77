"""The speed benchmark runs from start to end and writes the documented figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROW_KEYS = {
    "name",
    "rows",
    "distinct",
    "rank",
    "unsteered_ms",
    "steered_ms",
    "ratio_median",
    "ratio_p20",
    "ratio_p80",
    "rounds",
    "floor_bytes",
    "flops",
    "predicted_ratio",
}

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "result.json"
    options = ["--shape", "tiny", "--rank", "16", "--quick", "--json", str(path)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("VLLM_STEER_DISABLE", None)
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "speed_ratio.py"), *options],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def result(result_file: Path) -> dict[str, Any]:
    return json.loads(result_file.read_text())


def test_a_result_names_the_machine_and_the_versions(result: dict[str, Any]) -> None:
    assert {"cpu", "cores", "memory_gib", "load_average", "gpu", "driver"} == set(result["machine"])
    assert {"python", "torch", "vllm", "vllm_steer", "transformers"} <= set(result["versions"])
    assert {"commit", "dirty"} == set(result["git"])
    assert result["shape"] == "tiny"
    assert result["dtype"] in ("bfloat16", "float16", "float32")
    assert "--quick" in result["command"]


def test_every_case_is_measured_once(result: dict[str, Any]) -> None:
    cases = [(row["name"], row["rows"], row["distinct"]) for row in result["rows"]]
    assert cases == [
        ("unused", 1, 0),
        ("unused", 4, 0),
        ("loaded", 1, 0),
        ("loaded", 4, 0),
        ("steered", 1, 1),
        ("steered", 4, 1),
        ("steered", 4, 4),
        ("idle", 1, 0),
        ("idle", 4, 0),
        ("guided", 1, 1),
        ("guided", 4, 4),
        ("rotated", 1, 1),
        ("rotated", 4, 4),
    ]


def test_ratios_are_finite_and_ordered(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        ratios = [row["ratio_p20"], row["ratio_median"], row["ratio_p80"]]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
        assert ratios == sorted(ratios)
        assert row["predicted_ratio"] >= 1


def test_the_table_has_one_line_per_case(result_file: Path, result: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "benchmarks.table", str(result_file)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == len(result["rows"]) + 2
