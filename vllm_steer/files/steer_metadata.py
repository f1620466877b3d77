"""Metadata of a steer: from its file, or overrides from a config or a caller."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.steers import Mode, Schedule, Variant
from vllm_steer.steers.layers import parse_layers
from vllm_steer.steers.sites import Site
from vllm_steer.untrusted_text import LONGEST, is_number, printable, shown

_LONGEST_LAYERS = 1000
_MOST_ERRORS = 4


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


FORMAT_KEYS = ("orient", "rows", "feature", "hook")


class SteerMetadata(BaseModel):
    """Metadata of a steer; None means not given. Every field is also a key of a steer config.

    ``FORMAT_KEYS`` apply only to some file formats of other tools.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lm_steer", "vector", "delta"] | None = None
    hidden_size: PositiveInt | None = None
    variant: Variant | None = None
    epsilon: PositiveFloat | None = None
    fixed_columns: Columns | None = None
    columns: Columns | None = None
    layers: Layers | None = None
    site: Site | None = None
    mode: Mode | None = None
    schedule: Schedule | None = None
    orient: Annotated[bool, Field(strict=True)] | None = None
    rows: Rows | None = None
    feature: Index | None = None
    hook: str | None = None
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
