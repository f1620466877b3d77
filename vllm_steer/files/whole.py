"""Files that are there whole or not at all: what was there before stays until then."""

import os
from collections.abc import Callable
from pathlib import Path

from vllm_steer.errors import SteerError
from vllm_steer.files.source import cause


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in the place of ``path`` at once.

    Whatever ends the process, ``path`` is what it was before or what it is after, never a part.
    ``path`` may be what ``write`` reads from; where it is a link, the file that it names is
    replaced. The file's mode is what the umask leaves, whatever ``write`` gave it.

    Raises ``SteerError`` if it cannot be written, and for what is no plain file: a folder cannot be
    replaced, and a device must not be.
    """
    given, path = path, Path(os.path.realpath(path))
    if os.path.lexists(path) and not os.path.isfile(path):
        raise SteerError(f"{given}: is no plain file and cannot be replaced; choose another name")
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.chmod(0o666 & ~_umask())
        os.replace(unfinished, path)
    except SteerError:
        raise
    except Exception as error:  # the disk's errors and those of the format's own writer
        raise SteerError(f"{given}: cannot be written ({cause(error)})") from error
    finally:
        if os.path.exists(unfinished):  # unlike Path.exists no error for a name that is too long
            unfinished.unlink()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def write_text(path: str | Path, text: str) -> None:
    """``write_whole`` of a text in UTF-8."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
