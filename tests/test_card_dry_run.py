"""The run on a card from start to end, at tiny sizes and without one, as it is carried there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = {"engine-v2", "reading-v2", "engine-v1", "reading-v1"}
PHASES = {"machine", "kernels", *ENGINES, "steered", "operations", "guided"}

pytestmark = pytest.mark.matrix


@pytest.mark.timeout(900)
def test_every_phase_of_a_dry_run_says_ok(tmp_path: Path) -> None:
    """The package as a wheel installs it, the references, the script: nothing of the checkout."""
    pack, out = tmp_path / "pack", tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_"))}
    environment.pop("PYTHONPATH", None)
    for folder, command in (
        (ROOT, ["benchmarks.card.pack", pack, "--dry"]),
        (pack, ["benchmarks.card.run", ".", out, "--dry", "--seconds", "800"]),
    ):
        process = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=850,
        )
        assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    names = [phase["phase"] for phase in summary["phases"]]
    assert set(names) == PHASES and len(names) == len(PHASES)
    assert {phase["state"] for phase in summary["phases"]} == {"ok"}
    assert process.stdout.rindex("SUMMARY") < process.stdout.rindex("guided")
    assert summary["pack"]["git"]["commit"]
    for name in ENGINES:
        report = json.loads((out / f"{name}.json").read_text())
        assert report["engine"]["runner"] == name[-2:]
        num_checks = 7 if name.startswith("engine") else 6  # one has dynamic strengths
        assert len(report["checks"]) == num_checks and all(c["ok"] for c in report["checks"])
    (line,) = json.loads((out / "steered.json").read_text())["rows"]
    assert (line["rows"], line["distinct"]) == (4, 2) and line["profile"][0]["us"] > 0
    assert json.loads((out / "operations.json").read_text())["rows"]
