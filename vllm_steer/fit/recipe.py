"""How a steer was made, for its file: enough to make it again."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.foreign import printable

Recipe = Mapping[str, Any]
_READ_AT_ONCE = 1 << 20


def recipe(
    method: str,
    *,
    model: str,
    data: Sequence[str | Path],
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> Recipe:
    """The recipe of a fit, in plain JSON values; equal for equal fits, so no date is in it.

    ``settings`` are what the user chose or left at its default, ``figures`` what came out beside
    the steer (losses, accuracies). Data files enter by name and SHA-256.
    """
    from vllm_steer import __version__

    return {
        "method": method,
        "model": model,
        "data": [
            {"file": printable(Path(path).name), "sha256": file_digest(path)} for path in data
        ],
        "settings": dict(settings),
        "figures": dict(figures),
        "versions": {
            "vllm-steer": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def _entry(path: Path) -> dict[str, str]:
    # A name need not be UTF-8, which a steer file is.
    return {"file": printable(path.name), "sha256": file_digest(path)}


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
