"""A lock file gives a run folder to one process at a time, and names that process.

The lock is the kernel's (``flock``): it ends with the process, however that ends. A file that is
left behind is no lock.
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
_OURS: Final = re.compile(r"(\d+) (\S+) (\d{4}-\S+) .*\n?", re.DOTALL)
_LONGEST: Final = 500
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())
_descriptors: set[int] = set()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder, made if it is not there, is this process's alone while the block runs.

    A block within one that has the same folder is let through. Raises ``SteerError`` naming the
    process that has it, and for a folder that cannot be used.
    """
    try:
        path = os.path.realpath(folder)
    except ValueError as error:
        raise unusable(Path(folder), error) from error
    if path in _held.get():
        yield
        return
    made = _make(Path(folder))
    descriptor = _take(Path(folder))
    token = _held.set(_held.get() | {path})
    try:
        yield
    finally:
        _held.reset(token)
        _give_back(Path(folder), descriptor)
        if made:
            with suppress(OSError):  # what a run has written into stays
                os.rmdir(folder)


def _make(folder: Path) -> bool:
    """Whether the folder had to be made."""
    there = os.path.isdir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(folder, error) from error
    return not there


def _take(folder: Path) -> int:
    """The descriptor of the lock file, locked and with this process's name in it."""
    while True:
        try:
            descriptor = os.open(folder / LOCK, _FLAGS, 0o666)
        except OSError as error:
            raise unusable(folder, error) from error
        try:
            _lock(folder, descriptor)
            if _is_there(folder, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _own_name(), 0)
                _descriptors.add(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise unusable(folder, error) from error
        except SteerError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed the file: once more with a new one


def _lock(folder: Path, descriptor: int) -> None:
    found = os.fstat(descriptor)
    said = os.pread(descriptor, 2 * _LONGEST, 0) if stat.S_ISREG(found.st_mode) else b""
    name = _OURS.fullmatch(said.decode(errors="replace"))
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or (said and not name):
        raise SteerError(f"run folder {folder}: {LOCK} in it is not a run's; move it away")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = f"process {name[1]} ({name[2]}, since {name[3]})" if name else "another process"
        raise SteerError(
            f"run folder {folder} is used by {holder}; wait for it, or give another folder"
        ) from None


def _is_there(folder: Path, descriptor: int) -> bool:
    """Whether the locked file is still the one that others find."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK))
    except FileNotFoundError:
        return False


def _own_name() -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    command = cut(printable(shlex.join(sys.argv)), _LONGEST // 2)
    return f"{os.getpid()} {socket.gethostname() or '-'} {since} {command}\n".encode()


def _give_back(folder: Path, descriptor: int) -> None:
    _descriptors.discard(descriptor)
    with suppress(OSError):  # removed while it is locked: nobody can have got it before
        if _is_there(folder, descriptor):
            os.unlink(folder / LOCK)
    os.close(descriptor)


def unusable(folder: Path, error: OSError | ValueError) -> SteerError:
    """The error for a run folder that the system does not let be used."""
    return SteerError(f"run folder {folder}: cannot be used ({cause(error)})")


def _close_in_child() -> None:
    """A child that lives longer than its parent must not keep the parent's lock."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)
