"""The recipe of a steer, for its file: enough to reproduce it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_steer.digest import file_digest
from vllm_steer.untrusted_text import printable

Recipe = Mapping[str, Any]


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
    from vllm_steer.version import __version__

    return {
        "method": method,
        "model": model,
        # A name need not be UTF-8, which a steer file is.
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
