"""Files that are there whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vllm_steer import SteerError, VectorSteer, save_steer
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


def test_what_is_no_plain_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path(), Path("."), Path("/dev/null")):
        with pytest.raises(SteerError, match="no plain file and cannot be replaced"):
            write_text(path, "text")
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,))  # safetensors itself makes it 0600
    before = os.umask(0o027)
    try:
        save_steer(steer, tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


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
