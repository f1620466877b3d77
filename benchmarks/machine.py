"""The context of a figure: machine, versions, commit, command."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS = ("torch", "vllm", "vllm-steer", "transformers", "triton")


def describe_run(benchmark: str) -> dict[str, Any]:
    """The head of a result file, taken before the measurement; figures go under ``rows``."""
    return {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "git": describe_commit(),
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """The command line, as typed in the folder of the repository."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, memory and load; GPU name and driver, None without one.

    ``load_average`` is the current load: call this before the measurement, to see the load of other
    processes.
    """
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    on_card = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if on_card else None,
        "driver": _output(*query) if on_card else None,
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that determine speed; None for a missing one."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name.replace("-", "_")] = None
    return versions


def describe_commit() -> dict[str, Any]:
    """The repository's commit and whether files other than results differ from it; None outside of
    git.

    A copy packed for another machine has them in ``commit.json``.
    """
    packed = Path(__file__).with_name("commit.json")
    if packed.exists():
        commit: dict[str, Any] = json.loads(packed.read_text())
        return commit
    commit = _output("git", "rev-parse", "HEAD")
    status = _output("git", "status", "--porcelain", ":/", ":(exclude,top)benchmarks/results")
    return {"commit": commit, "dirty": None if commit is None else bool(status)}


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _output(*command: str) -> str | None:
    folder = Path(__file__).parent
    try:
        completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return completed.stdout.strip()
