"""SHA-256 digests of files, recorded in runs and recipes."""

import hashlib
from pathlib import Path
from typing import Final

from vllm_steer.errors import SteerError

_READ_AT_ONCE: Final = 1 << 20


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file; ``SteerError`` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_READ_AT_ONCE):
                digest.update(block)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
