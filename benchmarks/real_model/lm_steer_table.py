"""Tables."""

from typing import Any


def lm_steer_tables(data: dict[str, Any]) -> str:
    return ""
