"""Test with one vLLM: ``make test-version VERSION=0.28.0``, which makes ``.venv-0.28.0`` first.

Runs the engine suite on both model runners, the server tests and the Triton kernels in Triton's
interpreter, and writes the result of each run to ``benchmarks/results/versions/vllm-0.28.0.json``
as soon as it has ended. ``--runs v1,v2`` runs only these; the results of other runs stay.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions"
LIMIT_S = 5400  # time limit of one run

# By name of a run: the model runner, and what pytest is to take. Only in an engine is a kernel's
# test about vLLM's version; by itself it is about Triton's.
RUNS: dict[str, tuple[str, list[str]]] = {
    "v1": ("v1", ["-m", "engine and not matrix and not triton and not gpu"]),
    "v2": ("v2", ["-m", "engine and not matrix and not gpu"]),
    "http": ("v1", ["-m", "not engine and not matrix and not gpu", "tests/http"]),
    "kernels": ("v2", ["-m", "triton and not engine and not matrix and not gpu"]),
    "v1-matrix": ("v1", ["-m", "engine and matrix and not triton and not gpu"]),
    "v2-matrix": ("v2", ["-m", "engine and matrix and not gpu"]),
}
USUAL = ("v1", "v2", "http", "kernels")


def main() -> None:
    """Run the requested tests; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="the vLLM that this Python has")
    parser.add_argument("--runs", default=",".join(USUAL), help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--processes", type=int, default=2, help="test processes at once")
    version_arg = parser.parse_args()
    names = version_arg.runs.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"unknown runs: {', '.join(sorted(unknown))}")
    path = RESULTS / f"vllm-{version_arg.version}.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {"runs": {}}
    result["vllm"] = version_arg.version
    for name in names:
        counts_of_run = run(name, version_arg.version, version_arg.processes)
        result["runs"][name] = counts_of_run
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        counts = ", ".join(f"{counts_of_run[key]} {key}" for key in ("passed", "failed", "skipped"))
        print(f"[vllm {version_arg.version}, {name}] {counts}", flush=True)
    sys.exit(any(result["runs"][name]["exit_code"] for name in names))


def run(name: str, version: str, processes: int) -> dict[str, Any]:
    """Run pytest once in this environment; returns the result."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import describe_commit, describe_machine, describe_versions

    versions = describe_versions()
    if (versions["vllm"] or "").partition("+")[0] != version:
        sys.exit(f"this environment has vLLM {versions['vllm']}, not {version}")
    runner, chosen = RUNS[name]
    options = ["-n", str(processes), "--dist", "loadfile", *chosen]
    begun, head = time.monotonic(), {"git": describe_commit(), "machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "VLLM_STEER_TEST_RUNNER": runner, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}"]
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            code = 124
        counted = outcome(report) if report.exists() else outcome(None)
    return {
        **head,
        **counted,
        "versions": versions,
        "command": shlex.join([f"VLLM_STEER_TEST_RUNNER={runner}", "pytest", *options]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun),
        "exit_code": code,
    }


def outcome(report: Path | None) -> dict[str, Any]:
    """Counts, the failures' names, and the skipped tests' by reason, of pytest's XML report."""
    failures: list[str] = []
    skips: dict[str, list[str]] = {}
    cases = [] if report is None else list(ElementTree.parse(report).iter("testcase"))
    failed, skipped = set(), set()
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(name)
            failed.add(name)
        elif (mark := case.find("skipped")) is not None:
            skips.setdefault(mark.get("message") or "", []).append(name)
            skipped.add(name)
    passed = {f"{c.get('classname', '')}::{c.get('name', '')}" for c in cases} - failed - skipped
    return {
        "passed": len(passed),
        "failed": len(failed),
        "skipped": len(skipped - failed),
        "failures": sorted(failures),
        "skips": {reason: sorted(names) for reason, names in sorted(skips.items())},
    }


if __name__ == "__main__":
    main()
