"""Lock files that give a run folder to one process at a time and name that process.

The lock is the kernel's (``flock``) and ends with the process in any case; a lock file that was
left behind locks nothing.
"""

import fcntl
import os
import re
import shlex
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Final

from vllm_steer.errors import SteerError, cause
from vllm_steer.untrusted_text import cut, printable

LOCK: Final = ".vllm-steer.lock"
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_RECORD: Final = re.compile(r"(\d+) (\S+) (\d{4}-\S+) .*\n?", re.DOTALL)
_LONGEST: Final = 500
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())
_descriptors: set[int] = set()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock a folder for this process while the block runs; the folder is created if necessary.

    A nested block with the same folder does nothing. Raises ``SteerError`` with the process that
    holds the lock, and for a folder that cannot be used.
    """
    try:
        path = os.path.realpath(folder)
    except ValueError as error:
        raise unusable(Path(folder), error) from error
    if path in _held.get():
        yield
        return
    created = _create(Path(folder))
    descriptor = _acquire(Path(folder))
    token = _held.set(_held.get() | {path})
    try:
        yield
    finally:
        _held.reset(token)
        _release(Path(folder), descriptor)
        if created:
            with suppress(OSError):  # a folder with files of a run is kept
                os.rmdir(folder)


def _create(folder: Path) -> bool:
    """Create the folder if necessary; whether it was created."""
    existed = os.path.isdir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(folder, error) from error
    return not existed


def _acquire(folder: Path) -> int:
    """Lock the lock file, write this process's record into it and return its descriptor."""
    while True:
        try:
            descriptor = os.open(folder / LOCK, _FLAGS, 0o666)
        except OSError as error:
            raise unusable(folder, error) from error
        try:
            _lock(folder, descriptor)
            if _is_current(folder, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _holder_record(), 0)
                _descriptors.add(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise unusable(folder, error) from error
        except SteerError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous holder has just removed the file: retry with a new one


def _lock(folder: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    content = os.pread(descriptor, 2 * _LONGEST, 0) if stat.S_ISREG(status.st_mode) else b""
    record = _RECORD.fullmatch(content.decode(errors="replace"))
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or (content and not record):
        raise SteerError(
            f"run folder {folder}: {LOCK} in it is not a lock file of vllm-steer; move it away"
        )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (
            f"process {record[1]} ({record[2]}, since {record[3]})" if record else "another process"
        )
        raise SteerError(
            f"run folder {folder} is used by {holder}; wait for it, or give another folder"
        ) from None


def _is_current(folder: Path, descriptor: int) -> bool:
    """Whether the locked file is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK))
    except FileNotFoundError:
        return False


def _holder_record() -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    command = cut(printable(shlex.join(sys.argv)), _LONGEST // 2)
    return f"{os.getpid()} {socket.gethostname() or '-'} {since} {command}\n".encode()


def _release(folder: Path, descriptor: int) -> None:
    _descriptors.discard(descriptor)
    with suppress(OSError):  # removed while locked, so no other process can hold it
        if _is_current(folder, descriptor):
            os.unlink(folder / LOCK)
    os.close(descriptor)


def unusable(folder: Path, error: OSError | ValueError) -> SteerError:
    """The error for a run folder that the operating system refuses."""
    return SteerError(f"run folder {folder}: cannot be used ({cause(error)})")


def _close_in_child() -> None:
    """Release the locks in a forked child, which may outlive its parent."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)
