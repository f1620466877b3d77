"""The specification of a comparison: a YAML file of properties and their combinations.

properties:
  fr:    {steer: fr.safetensors, judge: "language:fr", strengths: [1, 1.5, 2]}
  cheer: {steer: cheer.safetensors, judge: "classifier:MODEL:POSITIVE", strengths: [2, 4], max: 4}
seen: [fr, cheer]
unseen: [fr+cheer]
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_steer.config import NAME, NO_STEER
from vllm_steer.config_text import read_config_file
from vllm_steer.doses import Kl
from vllm_steer.errors import SteerError
from vllm_steer.files.steer_metadata import FiniteFloat, Number, describe_errors
from vllm_steer.steers.schedules import SCHEDULES, Schedule
from vllm_steer.untrusted_text import listed, shown

Method = Literal["none", Schedule, "dynamic"]
METHODS: Final[tuple[Method, ...]] = ("none", *SCHEDULES, "dynamic")
Combination = tuple[str, ...]
"""Names of properties, in the order of the file."""


def _as_list(value: Any) -> Any:
    """A single value becomes a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


Strengths = Annotated[tuple[FiniteFloat, ...], BeforeValidator(_as_list), Field(min_length=1)]
Shares = Annotated[
    tuple[Annotated[float, Number, Field(gt=0, le=1)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
]


def _bound(value: Any) -> Any:
    """A bound as a request gives it: YAML's .inf is a number, and JSON has none."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


Bound = Annotated[float | Literal["inf", "-inf"] | None, BeforeValidator(_bound)]
Kls = Annotated[tuple[Kl, ...], BeforeValidator(_as_list), Field(min_length=1)]
_STRICT: Final = ConfigDict(extra="forbid", frozen=True)


class Property(BaseModel):
    """A property: the steer that induces it and the judge that detects it.

    ``strengths`` are tried as fixed strengths and with schedules, ``max`` as maxima of dynamic
    strengths. ``dynamic`` False keeps the strength fixed when other properties are dynamic.
    ``opposite`` inverts the judge's verdict. ``layers``, ``phase``, ``low``, ``high`` and ``when``
    are as in a request; a dynamic strength has only layers.
    """

    model_config = _STRICT

    steer: Path
    judge: str
    strengths: Strengths
    max: Strengths = (2.0,)
    dynamic: Annotated[bool, Field(strict=True)] = True
    opposite: Annotated[bool, Field(strict=True)] = False
    layers: str | None = None
    phase: str | dict[str, Any] | None = None
    low: Bound = None
    high: Bound = None
    when: str | dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of a fixed strength besides layers and schedule."""
        names = ("phase", "low", "high", "when")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("strengths", "max")
    @classmethod
    def _nonzero(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if 0 in values:
            raise ValueError(
                "0 is not a valid strength; the method 'none' covers the unsteered model"
            )
        return tuple(dict.fromkeys(values))


class ComparisonSpec(BaseModel):
    """The specification file; ``load`` makes its paths absolute.

    Strengths and options are selected on the ``seen`` combinations and applied to the ``unseen``
    ones. ``conditions`` are the files of those that ``when`` of a property names. ``top_p`` and
    ``kl`` are tried for dynamic strengths, with one value for all properties.
    ``examples`` maps combinations to files of prompts with demonstrations, see ``dppl``;
    ``demonstrations`` and ``instruction`` apply to files of inputs and outputs.
    """

    model_config = _STRICT

    properties: dict[str, Property]
    seen: tuple[Combination, ...]
    unseen: tuple[Combination, ...] = ()
    conditions: dict[str, Path] = {}
    methods: tuple[Method, ...] = METHODS
    top_p: Shares = (0.5,)
    kl: Kls = ("plain",)
    examples: dict[Combination, Path] = {}
    demonstrations: Annotated[int, Number, Field(ge=0)] = 4
    instruction: str = ""

    @classmethod
    def load(cls, path: str | Path) -> "ComparisonSpec":
        """Read a file. Raises ``SteerError`` with each invalid value and what is expected."""
        path = Path(path)
        if not os.path.isfile(path):
            problem = "is not a regular file" if os.path.lexists(path) else "no such file"
            raise SteerError(f"{path}: {problem}; give a YAML file of properties")
        try:
            data = read_config_file(path, str(path))
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
        if not isinstance(data, Mapping):
            raise SteerError(f"{path}: expected a mapping with at least 'properties' and 'seen'")
        try:
            spec = cls.model_validate(data)
        except ValidationError as error:
            raise SteerError(describe_errors(error, str(path))) from None
        return spec._normalized(path.absolute().parent)

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """All combinations, the seen ones first."""
        return (*self.seen, *self.unseen)

    @field_validator("properties")
    @classmethod
    def _names(cls, properties: dict[str, Property]) -> dict[str, Property]:
        for name in properties:
            if not NAME.fullmatch(name) or name == NO_STEER:
                raise ValueError(
                    f"{shown(name)} is not a valid name; use letters, digits, '_', '.', '-'"
                )
        return properties

    @field_validator("seen", "unseen", mode="before")
    @classmethod
    def _combinations(cls, value: Any) -> Any:
        return [_parts(item) for item in _as_list(value)]

    @field_validator("examples", mode="before")
    @classmethod
    def _examples(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        paths = {tuple(_parts(key)): path for key, path in value.items()}
        if len(set(map(frozenset, paths))) < len(value):
            raise ValueError("a combination is listed twice")
        return paths

    @field_validator("methods")
    @classmethod
    def _some_method(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        return tuple(method for method in METHODS if method in methods or method == "none")

    @model_validator(mode="after")
    def _agree(self) -> "ComparisonSpec":
        for combination in (*self.combinations, *self.examples):
            unknown = [name for name in combination if name not in self.properties]
            if unknown:
                raise ValueError(
                    f"property {listed(unknown)} is unknown; properties: {listed(self.properties)}"
                )
            if len(set(combination)) < len(combination):
                raise ValueError(f"{label(combination)} names a property twice")
        for name, prop in self.properties.items():
            fixed_only = [option for option in prop.options if option != "phase"]
            if fixed_only and prop.dynamic and "dynamic" in self.methods:
                raise ValueError(
                    f"property {name} has {', '.join(fixed_only)}, which a dynamic strength does "
                    "not have; give it dynamic: false"
                )
        self._check_split(set(map(frozenset, self.seen)), set(map(frozenset, self.unseen)))
        return self

    def _check_split(self, seen: set[frozenset[str]], unseen: set[frozenset[str]]) -> None:
        if not seen:
            raise ValueError(
                "seen is empty; strengths are selected on the seen combinations; give one"
            )
        if overlap := seen & unseen:
            raise ValueError(f"{label(tuple(sorted(overlap.pop())))} is both seen and unseen")
        if never_seen := frozenset().union(*unseen) - frozenset().union(*seen):
            raise ValueError(
                f"{', '.join(sorted(never_seen))} is in no seen combination, so no strength can "
                "be selected for it; add it to seen, for example by itself"
            )
        if unlisted := set(map(frozenset, self.examples)) - seen - unseen:
            raise ValueError(
                f"examples has {label(tuple(sorted(unlisted.pop())))}, which is neither in seen "
                "nor in unseen; add it to one of them"
            )

    def _normalized(self, folder: Path) -> "ComparisonSpec":
        """Absolute paths and distinct combinations, with properties in the order of the file."""
        order = list(self.properties)

        def ordered(combination: Combination) -> Combination:
            return tuple(sorted(combination, key=order.index))

        properties = {
            name: prop.model_copy(update={"steer": _absolute(folder, prop.steer)})
            for name, prop in self.properties.items()
        }
        update = {
            "properties": properties,
            "conditions": {n: _absolute(folder, path) for n, path in self.conditions.items()},
            "seen": tuple(dict.fromkeys(map(ordered, self.seen))),
            "unseen": tuple(dict.fromkeys(map(ordered, self.unseen))),
            "examples": {ordered(c): _absolute(folder, p) for c, p in self.examples.items()},
        }
        return self.model_copy(update=update)


def _absolute(folder: Path, path: Path) -> Path:
    try:
        return folder / path.expanduser()
    except RuntimeError as error:  # ~user of an unknown user
        raise SteerError(f"{path}: is not a valid path ({error})") from None


def label(combination: Combination) -> str:
    """The name of a combination, as in the file: ``fr+cheer``."""
    return "+".join(combination)


def _parts(value: Any) -> list[str]:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a string; give names joined by +, in quotes")
    return [part.strip(" ") for part in value.split("+")]
