"""What every command has in common: how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_steer import VectorSteer, save_steer


@pytest.fixture
def steer_file(tmp_path: Path) -> Path:
    save_steer(VectorSteer(vectors=torch.ones(1, 4), layers=(0,)), tmp_path / "steer")
    return tmp_path / "steer"


def start(*arguments: str, stdout: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()", *arguments]
    return subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, text=True)  # type: ignore[call-overload]


def test_figures_that_find_no_room_are_one_line_and_exit_code_1(steer_file: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = start("inspect", str(steer_file), "--json", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "vllm-steer: standard output: No space left on device\n"


def test_figures_that_nobody_reads_say_nothing(steer_file: Path) -> None:
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()"]
    with subprocess.Popen(
        [*line, "inspect", str(steer_file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_a_user_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = start("inspect", str(tmp_path / "missing"), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr
