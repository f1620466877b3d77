"""The file that a command writes, looked at before the work."""

import os
from pathlib import Path

from vllm_steer.errors import SteerError


def check_output(output: Path, force: bool) -> None:
    """``SteerError`` for an output that is there already, or that no file can be put in place of.

    ``force`` gives up a plain file only: a folder cannot be replaced, and a device must not be.
    """
    if os.path.lexists(output) and not force:
        raise SteerError(f"{output}: exists already; choose another name, or give --force")
    if os.path.lexists(output) and not os.path.isfile(output):
        raise SteerError(f"{output}: is no plain file and cannot be replaced; choose another name")
    if not os.path.isdir(output.parent):
        raise SteerError(f"{output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise SteerError(f"{output}: the folder cannot be written to; choose another")
