"""The doctor's engine process: why it ended, and its output until then."""

import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_tools import by_name

from vllm_steer.doctor.architecture import read_architecture
from vllm_steer.doctor.engine import run_engine
from vllm_steer.doctor.engine_process import EngineOutput, Job
from vllm_steer.doctor.report import examine, failed

JOB = Job("model", {}, {}, [[1]], {"unsteered": [{}]}, 1)
ANSWERED = '{"dtype": "float32", "runner": "V1", "device": "cpu", "batches": {"unsteered": []}}'


def python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")  # called as: python -m MODULE JOB ANSWERS
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "^the engine was killed by SIGKILL; it may have run out of memory$"),
        ("kill -11 $$", "^the engine was killed by SIGSEGV$"),
        (
            "echo 'Traceback'; echo 'vllm_steer.errors.SteerError: first'; echo 'ValueError: last';"
            "echo 'bye'; exit 1",
            "^the engine failed: ValueError: last$",
        ),
        (
            "echo '(Engine pid=7) ERROR 01-01 00:00:00 [core.py:1] RuntimeError: inner'; exit 1",
            "^the engine failed: RuntimeError: inner$",
        ),
        (
            "echo '[rank0]: vllm_steer.errors.SteerError: no'; echo '[rank0]: bye'; exit 1",
            "^the engine failed: vllm_steer.errors.SteerError: no$",
        ),
        (
            "echo 'pydantic.ValidationError: 1 error'; echo '  Value is 3 [type=x]'; echo; exit 1",
            r"^the engine failed: pydantic.ValidationError: 1 error Value is 3 \[type=x\]$",
        ),
        ("echo 'a b'; exit 3", "^the engine exited with code 3; its log ends: a b$"),
        ("exit 0", "^$"),
    ],
)
def test_why_an_engine_ended(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, script, monkeypatch)
    reason, problem = run_engine(JOB, tmp_path)
    assert reason == EngineOutput()
    assert re.search(message, problem)


def test_the_outputs_of_a_killed_engine_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, f"echo '{ANSWERED}' > $4; kill -9 $$", monkeypatch)
    output, problem = run_engine(JOB, tmp_path)
    assert (output.runner, output.batches) == ("V1", {"unsteered": []})
    assert "SIGKILL" in problem


def test_a_killed_engine_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(tmp_path, "kill -9 $$", monkeypatch)
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    findings = list(examine(read_architecture("embedded")))
    result = by_name(findings)
    assert failed(findings)
    assert result["engine"].state == "FAILED" and "SIGKILL" in result["engine"].message
    assert result["resid-add"].state == result["heads-delta"].state == "not tested"
    assert result["one vector in all layers"].figures["bytes"] == 4 * 128 * 4


def test_a_device_without_memory_for_the_reference_leaves_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr("vllm_steer.doctor.parity.load_model", full)
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    findings = by_name(examine(read_architecture("embedded")))
    assert findings["Hugging Face"].state == "not tested"
    assert "9 GiB" in findings["Hugging Face"].message and "one delta of 32 steps" in findings


@pytest.mark.parametrize(
    ("options", "given", "size"),
    [
        ({}, None, "2"),
        ({}, "5", "5"),
        ({"gpu_memory_utilization": 0.3}, None, "none"),
        ({"gpu_memory_utilization": 0.3}, "5", "5"),
    ],
)
def test_the_kv_cache_on_a_cpu_is_2_gib_unless_the_user_gives_a_size(
    options: Any, given: str | None, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if given is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", given)
    python(tmp_path, "echo ${VLLM_CPU_KVCACHE_SPACE:-none} >&2; exit 3", monkeypatch)
    job = Job("model", options, {}, [[1]], {"unsteered": [{}]}, 1)
    assert run_engine(job, tmp_path)[1].endswith(f"its log ends: {size}")
