"""Checks of a command's output file before the work begins."""

import os
from collections.abc import Iterable
from pathlib import Path

from vllm_steer.errors import SteerError, cause


def check_output(output: Path, force: bool, *, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise ``SteerError`` for an output that exists or cannot be written.

    ``force`` permits replacing a regular file, but no folder or device, and none of the ``inputs``,
    also if the output is a link to one.
    """
    from vllm_steer.files.atomic_write import check_replaceable

    if str(output) == "-":
        raise SteerError("-: standard output cannot be written to; give a file's name")
    for path in inputs:
        if path is not None and _same_file(output, path):
            raise SteerError(f"{output}: this is {path}, which is read; choose another name")
    if _is_there(output) and not force:
        raise SteerError(f"{output}: exists already; choose another name, or give --force")
    check_replaceable(output)
    if not os.path.isdir(output.parent):
        raise SteerError(f"{output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise SteerError(f"{output}: the folder cannot be written to; choose another")


def check_named(model: str, description: str = "") -> None:
    """Raise ``SteerError`` for a model name or a description that a steer file cannot hold."""
    from vllm_steer.files.safetensors_writer import check_metadata

    check_metadata({"base_model": model, "description": description})


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise SteerError(f"{path}: cannot be written ({cause(error)})") from error
    return True


def _same_file(output: Path, path: str | Path) -> bool:
    try:
        return os.path.samefile(output, path)
    except (OSError, ValueError):
        return False
