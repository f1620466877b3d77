"""Steers that are loaded into engines of two workers, in a process of their own."""

from pathlib import Path

import pytest
from engines import GUIDED, RUNNER
from scenarios import run_scenario

pytestmark = [
    pytest.mark.engine,
    pytest.mark.matrix,
    pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU"),
]


@pytest.mark.parametrize("scenario", ["loaded-on-tensor-ranks", "loaded-on-pipeline-stages"])
def test_all_workers_have_a_loaded_steer_or_none_has(scenario: str, tmp_path: Path) -> None:
    report = run_scenario(
        scenario,
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_STEER_TEST_FAIL=str(tmp_path / "fail"),
    )
    assert f"{len(GUIDED)} outputs equal" in report
    assert "a load that fails on rank 1 is on none" in report
