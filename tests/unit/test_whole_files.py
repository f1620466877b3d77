"""Files that are there whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_steer import SteerError
from vllm_steer.files.whole import write_text, write_whole


def test_what_was_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    write_text(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")

    def half(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SteerError, match=r"figures\.json: cannot be written .*No space left"):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_real_full_disk_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="cannot be written"):
        write_whole(tmp_path / "x", lambda _: Path("/dev/full").write_text("x" * 10_000))


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"missing/x: cannot be written"):
        write_text(tmp_path / "missing" / "x", "text")


def test_the_writers_own_error_is_kept(tmp_path: Path) -> None:
    def refuse(_: Path) -> None:
        raise SteerError("row 3 is bad")

    with pytest.raises(SteerError, match=r"^row 3 is bad$"):
        write_whole(tmp_path / "x", refuse)


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "steer"
    path.write_text("old")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from vllm_steer.files.whole import write_whole\n"
        "def write(path):\n"
        "    path.write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "write_whole(Path(sys.argv[1]), write)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
