"""Checks a command's output file before the work begins."""

import os
from collections.abc import Iterable
from pathlib import Path

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.atomic_write import check_replaceable
from vllm_steer.files.safetensors_writer import check_metadata


def check_output(output: Path, force: bool, *, inputs: Iterable[str | Path | None] = ()) -> None:
    """``SteerError`` for an output that is there already, or that no file can be put in place of.

    ``force`` gives up a plain file only: a folder cannot be replaced, and a device must not be. One
    of the ``inputs``, whatever name or link leads to it, is never given up.
    """
    if str(output) == "-":
        raise SteerError("-: standard output cannot be written to; give a file's name")
    for given in inputs:
        if given is not None and _same_file(output, given):
            raise SteerError(f"{output}: this is {given}, which is read; choose another name")
    if _is_there(output) and not force:
        raise SteerError(f"{output}: exists already; choose another name, or give --force")
    check_replaceable(output)
    if not os.path.isdir(output.parent):
        raise SteerError(f"{output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise SteerError(f"{output}: the folder cannot be written to; choose another")


def check_named(model: str, description: str = "") -> None:
    """``SteerError`` for a model's name or a description that no steer file can hold."""
    check_metadata({"base_model": model, "description": description})


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise SteerError(f"{path}: cannot be written ({cause(error)})") from error
    return True


def _same_file(output: Path, given: str | Path) -> bool:
    try:
        return os.path.samefile(output, given)
    except (OSError, ValueError):
        return False
