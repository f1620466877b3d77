"""Writes files atomically: a file is replaced only by a complete new one."""

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from vllm_steer.errors import SteerError, cause

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ENDING: Final = ".unfinished"
_RANDOM_BYTES: Final = 8
_LONGEST_NAME: Final = 255  # bytes
_UNFINISHED: Final = re.compile(r"\.(.+)\.[0-9a-f]{16}\.unfinished", re.DOTALL)


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file beside ``path`` with ``write``, then rename it to ``path``.

    If the process ends at any point, ``path`` has either the old or the new content. Two processes
    may write the same path. ``write`` may read from ``path``. A symbolic link is replaced, and its
    target stays unchanged. The new file's mode follows the umask.

    Raises ``SteerError`` if the file cannot be written, and if ``path`` is a folder, a device or
    anything else but a regular file.
    """
    path = Path(path)
    try:
        check_replaceable(path)
        unfinished = path.with_name(unfinished_name(path.name))
        _write(unfinished, path, write)
    except SteerError:
        raise
    except Exception as error:  # of the disk or of the format's writer
        raise SteerError(f"{path}: cannot be written ({cause(error)})") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 with ``write_atomically``."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_replaceable(path: Path) -> None:
    """Raise ``SteerError`` if ``path`` exists and is not a regular file."""
    if not os.path.lexists(path):
        return
    if os.path.exists(path) and not os.path.isfile(path):
        raise SteerError(
            f"{path}: is not a regular file and cannot be replaced; choose another path"
        )
    if os.path.islink(path) and os.readlink(path).startswith("/proc/"):  # such as /dev/stdout
        raise SteerError(f"{path}: is an open file of a process; choose another path")


def unfinished_name(name: str) -> str:
    """A unique hidden name for the temporary file that will become ``name``."""
    ending = f".{secrets.token_hex(_RANDOM_BYTES)}{_ENDING}"
    stem = os.fsencode(name)[: _LONGEST_NAME - 1 - len(ending)]
    return f".{os.fsdecode(stem)}{ending}"


def remove_unfinished(folder: Path, is_own_name: Callable[[str], bool]) -> None:
    """Remove temporary files of killed processes whose final name ``is_own_name`` accepts."""
    for entry in list(os.scandir(folder)):
        name = finished_name(entry.name)
        if name is not None and is_own_name(name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def finished_name(name: str) -> str | None:
    """The final name of a temporary file; None for any other file."""
    match = _UNFINISHED.fullmatch(name)
    return match[1] if match else None


def _write(unfinished: Path, path: Path, write: Callable[[IO[bytes]], object]) -> None:
    file = os.fdopen(os.open(unfinished, _NEW, 0o666), "w+b")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the rename to the disk; ignored on file systems that cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
