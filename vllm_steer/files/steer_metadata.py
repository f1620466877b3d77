"""Metadata of a steer: from its file, or overrides from a config or a caller."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.steers import Mode, SAEMode, Schedule, Side, Similarity, Tokens, Variant
from vllm_steer.steers.layers import parse_layers
from vllm_steer.steers.sites import Site
from vllm_steer.untrusted_text import LONGEST, is_number, printable, shown

_LONGEST_LAYERS = 1000
_MOST_ERRORS = 4
_INFINITE = {"inf": math.inf, "infinity": math.inf, "-inf": -math.inf, "-infinity": -math.inf}


def _column_list(value: Any) -> Any:
    """Accept '1' and '1,2', the notation of safetensors metadata, as well as a list of numbers."""
    if isinstance(value, str):
        return [part.strip(" ") for part in value.split(",")] if value.strip(" ") else []
    return value


def _number(value: Any) -> Any:
    """Reject booleans (YAML reads 'yes' and 'on' as true) and '1_0' (Python reads it as 10)."""
    if isinstance(value, bool) or (isinstance(value, str) and not is_number(value)):
        raise ValueError("expected a number")
    return value


def _bound(value: Any) -> Any:
    """A number, or an infinity as a text; a plan in JSON writes it ``"Infinity"``."""
    if isinstance(value, str) and value.lower() in _INFINITE:
        return _INFINITE[value.lower()]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("expected a number, inf or -inf")
    return _number(value)


def _layers(value: Any) -> tuple[int, ...]:
    # A file may contain '0-9999,0-9999,...' of any length.
    if isinstance(value, bool) or (isinstance(value, str) and len(value) > _LONGEST_LAYERS):
        raise ValueError("expected layers such as '8-31'")
    return parse_layers(value)


def _rows(value: Any) -> tuple[int, ...]:
    try:
        return _layers(value)
    except ValueError:
        raise ValueError("expected 0-based rows such as '1-32', '0,8' or 17") from None


Number = BeforeValidator(_number)
Columns = Annotated[tuple[Annotated[int, Number], ...], BeforeValidator(_column_list)]
Layers = Annotated[tuple[int, ...], BeforeValidator(_layers)]
Rows = Annotated[tuple[int, ...], BeforeValidator(_rows)]
FiniteFloat = Annotated[float, Number, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Number, Field(ge=1)]
Index = Annotated[int, Number, Field(ge=0)]
Bound = Annotated[float, BeforeValidator(_bound)]
Flag = Annotated[bool, Field(strict=True)]


FORMAT_KEYS = ("orient", "rows", "feature", "hook", "architecture", "apply_b_dec_to_input")


class SteerMetadata(BaseModel):
    """Metadata of a steer; None means not given. Every field is also a key of a steer config.

    ``FORMAT_KEYS`` apply only to some file formats of other tools.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lm_steer", "vector", "delta", "low_rank", "sae", "condition"] | None = None
    hidden_size: PositiveInt | None = None
    variant: Variant | None = None
    epsilon: PositiveFloat | None = None
    fixed_columns: Columns | None = None
    columns: Columns | None = None
    layers: Layers | None = None
    site: Site | None = None
    mode: Literal[Mode, SAEMode] | None = None
    low: Bound | None = None
    high: Bound | None = None
    schedule: Schedule | None = None
    threshold: FiniteFloat | None = None
    similarity: Similarity | None = None
    side: Side | None = None
    tokens: Tokens | None = None
    orient: Flag | None = None
    rows: Rows | None = None
    feature: Index | None = None
    hook: str | None = None
    architecture: str | None = None
    apply_b_dec_to_input: Flag | None = None
    default_strength: FiniteFloat | None = None
    base_model: str | None = None
    description: str | None = None

    def completed_by(self, file_metadata: "SteerMetadata") -> "SteerMetadata":
        """These values, and those of ``file_metadata`` where these are None."""
        own_values = self.model_dump(exclude_none=True)
        return SteerMetadata(**{**file_metadata.model_dump(exclude_none=True), **own_values})


def read_metadata(values: Mapping[str, Any], *, origin: str) -> SteerMetadata:
    """Validate untyped values; ``SteerError`` lists each unknown or malformed key."""
    try:
        return SteerMetadata(**values)
    except ValidationError as error:
        raise SteerError(describe_errors(error, origin)) from None


def describe_errors(error: ValidationError, origin: str) -> str:
    """List the first few invalid values: key, value and what is expected."""
    lines = []
    problems = error.errors(include_url=False)
    for item in problems[:_MOST_ERRORS]:
        field = printable(".".join(map(str, item["loc"])), LONGEST) or origin
        if item["type"] == "extra_forbidden":
            lines.append(f"{origin}: unknown key {field!r}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: key {field!r} is missing")
        elif item["type"] == "value_error" and not item["loc"]:
            lines.append(f"{origin}: {item['ctx']['error']}")
        else:
            lines.append(f"{origin}: {field} is {shown(item['input'])}: {item['msg']}")
    if len(problems) > _MOST_ERRORS:
        lines.append(f"and {len(problems) - _MOST_ERRORS} more")
    return "; ".join(lines)
