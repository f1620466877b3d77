"""Metadata of a steer: from its file, from a config or from a caller."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.foreign import LONGEST, is_number, printable, shown
from vllm_steer.steers import Mode, Schedule, Variant
from vllm_steer.steers.layers import parse_layers
from vllm_steer.steers.sites import Site

_LONGEST_LAYERS = 1000
_MOST_ERRORS = 4


def _column_list(value: Any) -> Any:
    """Accept '1' and '1,2', the metadata form, beside a list of numbers."""
    if isinstance(value, str):
        return [part.strip(" ") for part in value.split(",")] if value.strip(" ") else []
    return value


def _number(value: Any) -> Any:
    """YAML reads 'yes' and 'on' as true, which is no number; Python reads '1_0' as 10."""
    if isinstance(value, bool) or (isinstance(value, str) and not is_number(value)):
        raise ValueError("expected a number")
    return value


def _layers(value: Any) -> tuple[int, ...]:
    # A file may repeat '0-9999' without end.
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


FORMAT_FACTS = ("orient", "rows", "feature", "hook")


class Facts(BaseModel):
    """Facts about a steer. None means not said. Every field may stand in a steer config.

    ``FORMAT_FACTS`` are those that only some files of other tools have a use for.
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

    def over(self, found: "Facts") -> "Facts":
        """These facts, completed by what was found in the file."""
        said = self.model_dump(exclude_none=True)
        return Facts(**{**found.model_dump(exclude_none=True), **said})


def read_facts(given: Mapping[str, Any], *, origin: str) -> Facts:
    """Facts from untyped values; ``SteerError`` lists each that is unknown or malformed."""
    try:
        return Facts(**given)
    except ValidationError as error:
        raise SteerError(describe_errors(error, origin)) from None


def describe_errors(error: ValidationError, origin: str) -> str:
    """Each wrong value, where it is, what was found and what is expected; the first few of them."""
    lines = []
    wrong = error.errors(include_url=False)
    for item in wrong[:_MOST_ERRORS]:
        place = printable(".".join(map(str, item["loc"])), LONGEST) or origin
        if item["type"] == "extra_forbidden":
            lines.append(f"{origin}: unknown key {place!r}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: key {place!r} is missing")
        elif item["type"] == "value_error" and not item["loc"]:
            lines.append(f"{origin}: {item['ctx']['error']}")
        else:
            lines.append(f"{origin}: {place} is {shown(item['input'])}: {item['msg']}")
    if len(wrong) > _MOST_ERRORS:
        lines.append(f"and {len(wrong) - _MOST_ERRORS} more")
    return "; ".join(lines)
