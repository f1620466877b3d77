"""Run folders are locked by one process at a time; the lock ends with the process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vllm_steer import SteerError
from vllm_steer.evaluation.run import open_run
from vllm_steer.run_folder.lock import LOCK, locked

HOLD = """
import os, sys, time
from vllm_steer.run_folder import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv:
        ready, is_ready = os.pipe()
        if os.fork() == 0:
            os.write(is_ready, b".")
            time.sleep(60)
        os.read(ready, 1)
    print("locked", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path, *extra_arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *extra_arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_second_process_gets_the_owner_of_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
        name = rf"process {process.pid} \(\S+, since 2\S+\); wait for it"
        message = rf"^run folder {re.escape(str(tmp_path))} is used by {name}"
        with pytest.raises(SteerError, match=message), locked(tmp_path):
            pytest.fail("two at once")
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
        assert list(before) == [LOCK]
        pid, host, since, command = before[LOCK].decode().split(" ", 3)
        assert (int(pid), host) == (process.pid, os.uname().nodename)
        assert since[:2] == "20" and str(tmp_path) in command


@pytest.mark.parametrize("command", ["fit", "eval", "compare"])
def test_a_command_does_not_change_a_folder_in_use(tmp_path: Path, command: str) -> None:
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": -1}\n')
    (tmp_path / "asked.yaml").write_text("properties: {}\nseen: []\n")
    prompts = ["--prompts", str(data), "--prompt-field", "text", "--out", str(run), "--no-plot"]
    line = {
        "fit": ["fit", "lm-steer", "m", str(tmp_path / "out"), "--data", str(data)],
        "eval": ["eval", "m", "steer", *prompts, "--strengths", "1"],
        "compare": ["compare", "m", str(tmp_path / "asked.yaml"), *prompts],
    }[command]
    if command == "fit":
        line += ["--run-folder", str(run), "--restart"]
    with holder(run) as process:
        before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
        completed = subprocess.run(
            [sys.executable, "-c", "from vllm_steer.cli import main; main()", *line],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (completed.returncode, completed.stdout) == (1, "")
        assert completed.stderr.startswith(
            f"vllm-steer: run folder {run} is used by process {process.pid}"
        )
        assert completed.stderr.count("\n") == 1
        assert {entry.name: entry.read_bytes() for entry in run.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_process_that_ends_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.communicate("end\n")
        assert process.returncode == 0
        assert os.listdir(tmp_path) == []
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "extra_arguments", [(), ("fork",)], ids=["alone", "with-a-child-that-lives-on"]
)
def test_a_killed_process_leaves_no_lock(tmp_path: Path, extra_arguments: tuple[str, ...]) -> None:
    with holder(tmp_path, *extra_arguments) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.listdir(tmp_path) == [LOCK]
        deadline = time.monotonic() + 5
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
        assert time.monotonic() < deadline
    assert os.listdir(tmp_path) == []


def test_a_nested_lock_is_granted(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path / ".." / tmp_path.name):
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_in_another_thread_is_refused(tmp_path: Path) -> None:
    result: list[Exception] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                pass
        except SteerError as error:
            result.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in str(result[0])


def test_a_lock_can_be_taken_many_times_in_sequence(tmp_path: Path) -> None:
    """Removing the lock file never admits two processes."""
    program = (
        "import os, sys, time\n"
        "from vllm_steer import SteerError\n"
        "from vllm_steer.run_folder import locked\n"
        "mark, got = os.path.join(sys.argv[1], 'mark'), 0\n"
        "end = time.monotonic() + 20\n"
        "while got < 200 and time.monotonic() < end:\n"
        "    try:\n"
        "        with locked(sys.argv[1]):\n"
        "            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(mark)\n"
        "            got += 1\n"
        "    except SteerError as error:\n"
        "        assert 'is used by' in str(error), error\n"
        "print(got)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(int(output) > 0 for output in outputs)


def test_a_created_and_unused_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="no such model"), locked(tmp_path / "run"):
        raise SteerError("no such model")
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "loss.csv").write_text("")
    assert os.listdir(tmp_path / "run") == ["loss.csv"]


def test_a_planted_lock_file_is_not_written_to(tmp_path: Path) -> None:
    content, run = tmp_path / "mine", tmp_path / "run"
    content.write_text("precious")
    run.mkdir()
    for plant in (
        lambda: (run / LOCK).symlink_to(content),
        lambda: os.link(content, run / LOCK),
        lambda: os.mkfifo(run / LOCK),
        lambda: (run / LOCK).mkdir(),
        lambda: (run / LOCK).write_text("notes"),
    ):
        plant()
        message = r"^run folder .*run: (cannot be used|.* not a lock file)"
        with pytest.raises(SteerError, match=message), locked(run):
            pass
        assert content.read_text() == "precious" and os.path.lexists(run / LOCK)
        (run / LOCK).rmdir() if (run / LOCK).is_dir() else (run / LOCK).unlink()


def test_the_lock_is_the_runs_own_file(tmp_path: Path) -> None:
    with locked(tmp_path):
        run = open_run(tmp_path, {"model": "m"})
        assert open_run(tmp_path, {"model": "n"}).folder == run.folder


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    names = ("file", "file/run", "a\0b", "x" * 300)
    for folder in (tmp_path / name for name in names):
        with pytest.raises(SteerError, match=r"^run folder .*: cannot be used \("), locked(folder):
            pass
