"""Tables."""

from typing import Any


def concept_guidance_tables(data: dict[str, Any]) -> str:
    """Tables."""
    return ""
