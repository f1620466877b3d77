"""Files are written atomically."""

import errno
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import torch

from vllm_steer import SteerError, VectorSteer, save_steer
from vllm_steer.files.atomic_write import (
    finished_name,
    remove_unfinished,
    unfinished_name,
    write_atomically,
    write_text,
)


def test_a_written_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    write_text(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_full_disk_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")

    def half(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SteerError, match=r"figures\.json: cannot be written .*No space left"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_real_full_disk_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="cannot be written"):
        write_atomically(tmp_path / "x", lambda _: Path("/dev/full").write_text("x" * 10_000))
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"missing/x: cannot be written"):
        write_text(tmp_path / "missing" / "x", "text")


def test_a_path_that_is_not_a_plain_file_is_unchanged(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path(), Path("."), Path("/dev/null")):
        with pytest.raises(SteerError, match="not a regular file and cannot be replaced"):
            write_text(path, "text")
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("target", ["target", "no-such-file"])
def test_a_link_is_replaced_and_its_file_stays(tmp_path: Path, target: str) -> None:
    (tmp_path / "target").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    write_text(link, "new")
    assert not link.is_symlink() and link.read_text() == "new"
    assert (tmp_path / "target").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_link_to_an_open_file_of_a_process_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    with pytest.raises(SteerError, match=r"not a regular file|an open file of a process"):
        write_text(link, "new")
    assert link.is_symlink()


def test_a_hard_link_leaves_the_other_name_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("old")
    os.link(tmp_path / "first", tmp_path / "second")
    write_text(tmp_path / "second", "new")
    assert (tmp_path / "first").read_text() == "old"


def test_other_files_in_the_folder_are_unchanged(tmp_path: Path) -> None:
    files = {"x.unfinished": "mine", ".x.unfinished": "mine", ".x.0123456789abcdef.unfinished": "m"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    write_text(tmp_path / "x", "new")
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert len(os.listdir(tmp_path)) == 4


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def outer(file: IO[bytes]) -> None:
        file.write(b"outer, ")
        write_text(path, "inner")
        assert path.read_text() == "inner"
        file.write(b"whole")

    write_atomically(path, outer)
    assert path.read_text() == "outer, whole"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "\udcff" * 250, "-", "a\nb"])
def test_any_name_that_a_file_can_have_is_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "new")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "\ud800", "x/" * 3000 + "x"])
def test_an_impossible_file_name_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SteerError, match="cannot be written"):
        write_text(tmp_path / name, "new")
    assert os.listdir(tmp_path) == []


def test_a_text_that_is_no_utf_8_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"cannot be written .*surrogates not allowed"):
        write_text(tmp_path / "x", "\ud800")
    assert os.listdir(tmp_path) == []


def test_only_unfinished_files_with_our_names_are_removed(tmp_path: Path) -> None:
    own_name = unfinished_name("report.json")
    assert finished_name(own_name) == "report.json"
    other_names = [
        "report.json.unfinished",
        "thesis.unfinished",
        ".report.json.123.unfinished",
        unfinished_name("thesis"),
    ]
    for name in (own_name, *other_names):
        (tmp_path / name).write_text("")
    (tmp_path / unfinished_name("report.json")).symlink_to(tmp_path / "thesis.unfinished")
    remove_unfinished(tmp_path, {"report.json"}.__contains__)
    remaining = os.listdir(tmp_path)
    assert (
        own_name not in remaining
        and set(other_names) < set(remaining)
        and len(remaining) == len(other_names) + 1
    )


def test_an_interruption_leaves_no_file(tmp_path: Path) -> None:
    def interrupted(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", interrupted)
    assert os.listdir(tmp_path) == []


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,))  # safetensors itself makes it 0600
    before = os.umask(0o027)
    try:
        save_steer(steer, tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_the_writers_own_error_is_kept(tmp_path: Path) -> None:
    def refuse(_: IO[bytes]) -> None:
        raise SteerError("row 3 is bad")

    with pytest.raises(SteerError, match=r"^row 3 is bad$"):
        write_atomically(tmp_path / "x", refuse)


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "steer"
    path.write_text("old")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from vllm_steer.files.atomic_write import write_atomically\n"
        "def write(file):\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "write_atomically(Path(sys.argv[1]), write)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_path_at_the_temporary_name_is_neither_followed_nor_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)  # as if it could be guessed
    victim, unfinished = tmp_path / "victim", tmp_path / f".out.{'0' * 16}.unfinished"
    victim.write_text("mine")
    if planted == "link":
        unfinished.symlink_to(victim)
    else:
        unfinished.write_text("mine")
    with pytest.raises(SteerError, match="out: cannot be written"):
        write_text(tmp_path / "out", "theirs")
    assert victim.read_text() == unfinished.read_text() == "mine"
    assert not (tmp_path / "out").exists()
