"""JSON files of a run folder."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_steer.files.atomic_write import write_text
from vllm_steer.files.json_text import json_text


def write_json(path: Path, value: Any) -> None:
    """Write plain data atomically as JSON; numbers that are not finite become null."""
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """Plain data as JSON, indented by two spaces; numbers that are not finite become null."""
    return json_text(finite(value), indent=2)


def finite(value: Any) -> Any:
    """The same data with None for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
