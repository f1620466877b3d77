"""``vllm-steer doctor`` with a real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_steer import embedded


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("vllm-steer")), "doctor", *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_embedded_model_works_at_every_site() -> None:
    completed = doctor(
        "embedded", "--json", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128"
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    result = {finding["name"]: finding for finding in json.loads(completed.stdout)["findings"]}
    assert result["engine"]["figures"]["dtype"] == "float32"
    assert result["zero steers"]["state"] == result["zero steers, reading"]["state"] == "ok"
    names = (
        *("unsteered", "unsteered, reading", "head-multiply", "head-offset", "resid-add"),
        *("resid-rotate", "attn_in-rotate", "attn_out-add", "heads-delta"),
        *("resid-project", "resid-relative", "resid-clamp", "resid-low_rank", "resid-window"),
        *("resid-when", "attn_in-relative", "attn_in-low_rank", "attn_out-project"),
        "attn_out-scale",
    )
    for name in names:
        figures = result[name]["figures"]
        assert result[name]["state"] == "ok"
        assert figures["difference"] < 1e-3 and figures["agreement"] == 1
    assert all(result[name]["figures"]["effect"] > 1 for name in names[2:])


def test_the_memory_of_a_config_is_reported_without_an_engine() -> None:
    completed = doctor("embedded", "--no-engine", "--steer-config", str(embedded.STEER_CONFIG))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "switched off by --no-engine" in completed.stdout
    assert all(steer.stem in completed.stdout for steer in embedded.STEERS.glob("*.safetensors"))
    assert "all steers" in completed.stdout and "max_rank 1024" in completed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/model",), "vllm-steer: model /no/such/model: cannot be read ("),
        (
            ("embedded", "--steer-config", "/no/steers.yaml"),
            "vllm-steer: steer config /no/steers.yaml: no such file",
        ),
        (("embedded", "--dtype", "int8"), "vllm-steer: dtype is 'int8'; allowed: auto, float32"),
    ],
)
def test_an_unreadable_file_gives_one_line_and_exit_code_1(
    arguments: tuple[str, ...], message: str
) -> None:
    completed = doctor(*arguments)
    assert completed.returncode == 1
    assert (
        completed.stdout == ""
        and completed.stderr.startswith(message)
        and completed.stderr.count("\n") == 1
    )
