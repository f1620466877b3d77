"""Requests of the tests of a served model."""

from typing import Any

BASE = "base"
PROMPT = "Once upon a time"
NEW_TOKENS = 12
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS}
