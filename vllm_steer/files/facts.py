"""What is said about a steer beside its tensors: by the file, by a config or by a caller."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.steer import LMSteer, Variant


def _column_list(value: Any) -> Any:
    """Accept '1' and '1,2', the metadata form, beside a list of numbers."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return value


def _no_bool(value: Any) -> Any:
    """YAML reads 'yes' and 'on' as true, which is no number."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


NoBool = BeforeValidator(_no_bool)
Columns = Annotated[tuple[Annotated[int, NoBool], ...], BeforeValidator(_column_list)]
FiniteFloat = Annotated[float, NoBool, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, NoBool, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, NoBool, Field(ge=1)]


class Facts(BaseModel):
    """Facts about a steer. None means not said. Every field may stand in a steer config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lm_steer"] | None = None
    variant: Variant | None = None
    hidden_size: PositiveInt | None = None
    epsilon: PositiveFloat | None = None
    fixed_columns: Columns | None = None
    columns: Columns | None = None
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
    """One line per wrong value: where it is, what was given, what is wanted."""
    lines = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"])) or origin
        if item["type"] == "extra_forbidden":
            lines.append(f"{origin}: unknown key {place!r}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: key {place!r} is missing")
        elif item["type"] == "value_error" and not item["loc"]:
            lines.append(f"{origin}: {item['ctx']['error']}")
        else:
            lines.append(f"{origin}: {place} is {item['input']!r}: {item['msg']}")
    return "; ".join(lines)


def make_lm_steer(tensors: Mapping[str, torch.Tensor], facts: Facts) -> LMSteer:
    """An ``LMSteer`` from a file's tensors and the facts known about it.

    Raises ``SteerError`` for facts that are missing and for all that ``LMSteer`` itself refuses.
    """
    if facts.epsilon is None:
        raise SteerError("epsilon is not in the file; give it as a key, such as epsilon: 0.001")
    steer = LMSteer(
        variant=facts.variant or _variant_of(tensors),
        epsilon=facts.epsilon,
        hidden_size=facts.hidden_size or _width(tensors),
        fixed_columns=facts.fixed_columns or (),
        default_strength=facts.default_strength,
        base_model=facts.base_model or "",
        description=facts.description or "",
        **tensors,
    )
    return _keep_columns(steer, facts.columns)


def _width(tensors: Mapping[str, torch.Tensor]) -> int:
    if not tensors:
        raise SteerError("it holds no tensors")
    if "offset" in tensors:
        raise SteerError("an offset steer does not tell the hidden size; give hidden_size as a key")
    name, tensor = next(iter(tensors.items()))
    if tensor.ndim < 2:
        raise SteerError(
            f"tensor {name} is {list(tensor.shape)}; a [columns, ...] tensor is wanted"
        )
    return int(tensor.shape[1])


def _variant_of(tensors: Mapping[str, torch.Tensor]) -> Variant:
    if "projector1" in tensors:
        return "multiply"
    return "add" if "add" in tensors else "offset"


def _keep_columns(steer: LMSteer, columns: tuple[int, ...] | None) -> LMSteer:
    """The steer reduced to some of its columns; fixed columns are renumbered with them."""
    if columns is None:
        return steer
    outside = [c for c in columns if not 0 <= c < steer.columns]
    if outside or not columns or len(set(columns)) != len(columns):
        raise SteerError(
            f"columns {list(columns)}: this steer has columns 0 to {steer.columns - 1}; "
            "name each one wanted once"
        )
    tensors: dict[str, Any] = {name: t[list(columns)] for name, t in steer.tensors.items()}
    fixed = tuple(i for i, c in enumerate(columns) if c in steer.fixed_columns)
    return replace(steer, fixed_columns=fixed, **tensors)
