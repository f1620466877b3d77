"""The specification of a comparison: a YAML file of properties and their combinations.

properties:
  fr:    {steer: fr.safetensors, judge: "language:fr", strengths: [1, 1.5, 2]}
  cheer: {steer: cheer.safetensors, judge: "classifier:MODEL:POSITIVE", strengths: [2, 4], max: 4}
seen: [fr, cheer]
unseen: [fr+cheer]
"""

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
from vllm_steer.doses import Kl, RequestPhase
from vllm_steer.errors import SteerError
from vllm_steer.files.steer_metadata import FiniteFloat, Number, describe_errors
from vllm_steer.steers.schedules import SCHEDULES, Schedule
from vllm_steer.untrusted_text import listed, shown

Method = Literal["none", Schedule, "dynamic"]
METHODS: Final[tuple[Method, ...]] = ("none", *SCHEDULES, "dynamic")
Combination = tuple[str, ...]
"""Names of properties, in the order of the file."""


def _listed(value: Any) -> Any:
    """One value stands for a list of it."""
    return list(value) if isinstance(value, list | tuple) else [value]


Strengths = Annotated[tuple[FiniteFloat, ...], BeforeValidator(_listed), Field(min_length=1)]
Shares = Annotated[
    tuple[Annotated[float, Number, Field(gt=0, le=1)], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
]
Kls = Annotated[tuple[Kl, ...], BeforeValidator(_listed), Field(min_length=1)]
_STRICT: Final = ConfigDict(extra="forbid", frozen=True)


class Property(BaseModel):
    """A property: the steer that brings it about, the judge that says whether a text has it.

    ``strengths`` are tried at fixed strength and on a schedule, ``max`` as the maximum of a dynamic
    strength; ``dynamic`` False keeps the steer at a fixed strength among dynamic ones. ``opposite``
    asks the judge for the other side. ``layers`` and ``phase`` are as in a request; a dynamic
    strength has no phase.
    """

    model_config = _STRICT

    steer: Path
    judge: str
    strengths: Strengths
    max: Strengths = (2.0,)
    dynamic: Annotated[bool, Field(strict=True)] = True
    opposite: Annotated[bool, Field(strict=True)] = False
    layers: str | None = None
    phase: RequestPhase | None = None

    @field_validator("strengths", "max")
    @classmethod
    def _act(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if 0 in values:
            raise ValueError("0 is no steer; the method 'none' stands for it")
        return tuple(dict.fromkeys(values))


class Composition(BaseModel):
    """The file as a whole; paths are absolute once it is loaded.

    Strengths and options are chosen on the ``seen`` combinations and taken over for the ``unseen``
    ones. ``top_p`` and ``kl`` are tried for dynamic strengths, the same for all properties.
    ``examples`` name a file of prompts with demonstrations per combination, see ``dppl``;
    ``demonstrations`` and ``instruction`` are for those of inputs and outputs.
    """

    model_config = _STRICT

    properties: dict[str, Property]
    seen: tuple[Combination, ...]
    unseen: tuple[Combination, ...] = ()
    methods: tuple[Method, ...] = METHODS
    top_p: Shares = (0.5,)
    kl: Kls = ("plain",)
    examples: dict[Combination, Path] = {}
    demonstrations: Annotated[int, Number, Field(ge=0)] = 4
    instruction: str = ""

    @classmethod
    def load(cls, path: str | Path) -> "Composition":
        """Read the file. Raises ``SteerError`` with each wrong value and what is expected."""
        path = Path(path)
        if not os.path.isfile(path):
            problem = "is no file" if os.path.lexists(path) else "no such file"
            raise SteerError(f"{path}: {problem}; give a .yaml of properties")
        try:
            data = read_config_file(path, str(path))
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
        if not isinstance(data, Mapping):
            raise SteerError(f"{path}: holds no mapping; wanted at least 'properties' and 'seen'")
        try:
            found = cls.model_validate(data)
        except ValidationError as error:
            raise SteerError(describe_errors(error, str(path))) from None
        return found._settled(path.absolute().parent)

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The seen ones first."""
        return (*self.seen, *self.unseen)

    @field_validator("properties")
    @classmethod
    def _names(cls, named: dict[str, Property]) -> dict[str, Property]:
        for name in named:
            if not NAME.fullmatch(name) or name == NO_STEER:
                raise ValueError(f"{shown(name)} cannot be a name: letters, digits, '_', '.', '-'")
        return named

    @field_validator("seen", "unseen", mode="before")
    @classmethod
    def _combinations(cls, given: Any) -> Any:
        return [_parts(each) for each in _listed(given)]

    @field_validator("examples", mode="before")
    @classmethod
    def _examples(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        found = {tuple(_parts(key)): value for key, value in given.items()}
        if len(set(map(frozenset, found))) < len(given):
            raise ValueError("a combination is given twice")
        return found

    @field_validator("methods")
    @classmethod
    def _some_method(cls, given: tuple[Method, ...]) -> tuple[Method, ...]:
        return tuple(method for method in METHODS if method in given or method == "none")

    @model_validator(mode="after")
    def _agree(self) -> "Composition":
        for combination in (*self.combinations, *self.examples):
            unknown = [name for name in combination if name not in self.properties]
            if unknown:
                raise ValueError(
                    f"property {listed(unknown)} is unknown; properties: {listed(self.properties)}"
                )
            if len(set(combination)) < len(combination):
                raise ValueError(f"{label(combination)} names a property twice")
        self._check_split(set(map(frozenset, self.seen)), set(map(frozenset, self.unseen)))
        return self

    def _check_split(self, seen: set[frozenset[str]], unseen: set[frozenset[str]]) -> None:
        if not seen:
            raise ValueError("seen is empty; strengths are chosen on seen combinations")
        if both := seen & unseen:
            raise ValueError(f"{label(tuple(sorted(both.pop())))} is both seen and unseen")
        if left := frozenset().union(*unseen) - frozenset().union(*seen):
            raise ValueError(
                f"{', '.join(sorted(left))} is in no seen combination, so that no strength can be "
                "chosen for it; add it to seen, by itself if nothing else"
            )
        if beyond := set(map(frozenset, self.examples)) - seen - unseen:
            raise ValueError(
                f"examples of {label(tuple(sorted(beyond.pop())))}: neither seen nor unseen"
            )

    def _settled(self, folder: Path) -> "Composition":
        """Absolute paths; each combination once, its properties in the order of the file."""
        order = list(self.properties)

        def ordered(combination: Combination) -> Combination:
            return tuple(sorted(combination, key=order.index))

        properties = {
            name: each.model_copy(update={"steer": _absolute(folder, each.steer)})
            for name, each in self.properties.items()
        }
        changed = {
            "properties": properties,
            "seen": tuple(dict.fromkeys(map(ordered, self.seen))),
            "unseen": tuple(dict.fromkeys(map(ordered, self.unseen))),
            "examples": {ordered(c): _absolute(folder, p) for c, p in self.examples.items()},
        }
        return self.model_copy(update=changed)


def _absolute(folder: Path, path: Path) -> Path:
    try:
        return folder / path.expanduser()
    except RuntimeError as error:  # ~ of somebody who is not known here
        raise SteerError(f"{path}: cannot be a path ({error})") from None


def label(combination: Combination) -> str:
    """As it stands in the file: ``fr+cheer``."""
    return "+".join(combination)


def _parts(given: Any) -> list[str]:
    if not isinstance(given, str):
        raise ValueError(f"{shown(given)} is no text; give names joined by +, in quotes if need be")
    return [part.strip(" ") for part in given.split("+")]
