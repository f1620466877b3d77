"""Every error of a command is one line and an exit code."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_tools import MAIN, call, steer_of
from hostile_texts import assert_shown

from vllm_steer import SteerError, load_steer
from vllm_steer.cli import main


@pytest.mark.parametrize("case", ["folder", "pipe", "device", "gone", "-", "unreadable", "empty"])
def test_a_file_that_is_not_a_steer_gives_one_line(tmp_path: Path, case: str) -> None:
    content: dict[str, Any] = {"folder": tmp_path, "device": "/dev/zero", "-": "-"}
    path = content.get(case, tmp_path / case)
    if case == "pipe":
        os.mkfifo(path)
    if case in ("unreadable", "empty"):
        Path(path).write_bytes(b"")
        Path(path).chmod(0o000 if case == "unreadable" else 0o600)
    completed = call("convert", path, tmp_path / "out")
    assert isinstance(completed.exception, SteerError) and completed.output == ""
    assert str(completed.exception).startswith(f"{path}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (SteerError("a\nb"), 1, "vllm-steer: a\\nb\n"),
        (RecursionError("deep"), 1, "vllm-steer: RecursionError: deep\n"),
        (MemoryError(), 1, "vllm-steer: MemoryError: MemoryError\n"),
        (OverflowError("big"), 1, "vllm-steer: OverflowError: big\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad\x1b"), 1, None),
        (OSError(28, "No space left on device", "a\x1b[31m"), 1, None),
        (KeyboardInterrupt(), 130, "vllm-steer: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_gives_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str | None,
) -> None:
    def fails() -> None:
        raise raised

    monkeypatch.setattr("vllm_steer.cli.app", fails)
    content = os.dup(1)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        os.dup2(content, 1)
        os.close(content)
    assert caught.value.code == code
    result = capfd.readouterr().err
    assert result.count("\n") == 1
    assert_shown(result)
    assert message in (None, result)


def test_an_interrupted_command_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    program = (
        "import signal, time\nfrom vllm_steer import cli, files\n"
        # A background job of a shell ignores interrupts, and so would this process.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*_):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "files.read_file = wait\ncli.main()\n"
    )
    line = [sys.executable, "-c", program, "convert", "in", str(tmp_path / "out")]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_a_full_standard_output_leaves_no_file(tmp_path: Path) -> None:
    steer = steer_of(tmp_path / "in", "x")
    line = [sys.executable, "-c", MAIN, "convert", str(steer), str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        completed = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert completed.returncode == 1 and completed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_does_not_fail_the_command(tmp_path: Path, closed: str) -> None:
    steer = steer_of(tmp_path / "in", "x")
    line = [sys.executable, "-c", MAIN, "convert", str(steer), str(tmp_path / "out")]
    completed = subprocess.run(["bash", "-c", f"{shlex.join(line)} {closed}"], timeout=60)
    assert completed.returncode == 0 and load_steer(tmp_path / "out").layers == (0, 1)
    again = subprocess.run(["bash", "-c", f"{shlex.join(line)} {closed}"], timeout=60)
    assert again.returncode == 1
