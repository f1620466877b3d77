"""Writes files atomically: the old file stays until the new one is complete."""

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


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file beside ``path``, then put it in the place of ``path`` at once.

    Whatever ends the process, ``path`` is what it was before or what it is after, never a part;
    two processes that write it at once do not disturb each other. ``path`` may be what ``write``
    reads from. A symbolic link there is replaced, and the file that it names stays as it is. The
    new file has the mode that the umask leaves.

    Raises ``SteerError`` if it cannot be written, and for what is no plain file: a folder cannot be
    replaced, and a device must not be.
    """
    path = Path(path)
    try:
        check_replaceable(path)
        unfinished = path.with_name(unfinished_name(path.name))
        _write(unfinished, path, write)
    except SteerError:
        raise
    except Exception as error:  # the disk's errors and those of the format's own writer
        raise SteerError(f"{path}: cannot be written ({cause(error)})") from error


def write_text(path: str | Path, text: str) -> None:
    """``write_whole`` of a text in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def check_replaceable(path: Path) -> None:
    """``SteerError`` for a path at which there is something that is no plain file."""
    if not os.path.lexists(path):
        return
    if os.path.exists(path) and not os.path.isfile(path):
        raise SteerError(f"{path}: is no plain file and cannot be replaced; choose another name")
    if os.path.islink(path) and os.readlink(path).startswith("/proc/"):  # such as /dev/stdout
        raise SteerError(f"{path}: is an open file of a process; choose another name")


def unfinished_name(name: str) -> str:
    """A new name, hidden and unlike any other, for a file that is to become ``name``."""
    ending = f".{secrets.token_hex(_RANDOM_BYTES)}{_ENDING}"
    kept = os.fsencode(name)[: _LONGEST_NAME - 1 - len(ending)]
    return f".{os.fsdecode(kept)}{ending}"


def clear_unfinished(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what killed processes were writing in a folder, to names that ``is_ours`` knows."""
    for entry in list(os.scandir(folder)):
        name = finished_name(entry.name)
        if name is not None and is_ours(name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def finished_name(name: str) -> str | None:
    """What a file with a name of ``unfinished_name`` was to become; None for any other file."""
    found = _UNFINISHED.fullmatch(name)
    return found[1] if found else None


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
    """Bring the new name to the disk; the file is in its place even where that cannot be done."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
