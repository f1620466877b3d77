"""``--steer-config``: the steers, presets, default and limits of an engine."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_steer.config_text import LARGEST, read_config_file
from vllm_steer.errors import SteerError
from vllm_steer.files.json_text import read_json
from vllm_steer.files.size_limits import check_nesting
from vllm_steer.files.steer_metadata import (
    PositiveFloat,
    PositiveInt,
    SteerMetadata,
    describe_errors,
)
from vllm_steer.kernels.dispatch import Kernels
from vllm_steer.runtime_config import RuntimeConfig
from vllm_steer.untrusted_text import is_number, listed, printable, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
LONGEST_NAME = 200
_LONGEST_PATH = 200
NO_STEER = "none"
ALL_LAYERS = "all"
"""The value of a steer's ``layers`` that stands for those that have its site."""
DYNAMIC = "dynamic"
"""The strength value that selects a dynamic strength."""


def _mix_entry(value: Any) -> Any:
    """A preset's part of a steer: its strength, or its options as in a request."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("expected options such as {strength: 8}, their names as texts")
        return dict(value)
    if isinstance(value, str) and value.strip().startswith(DYNAMIC):
        return value
    try:
        if isinstance(value, bool) or (isinstance(value, str) and not is_number(value)):
            raise ValueError
        if not math.isfinite(number := float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            "expected a finite number, 'dynamic', or options such as {strength: 8}"
        ) from None
    return number


MixEntry = Annotated[Any, BeforeValidator(_mix_entry)]


Untested = Literal["warn", "refuse"]


class SteerEntry(SteerMetadata):
    """One steer of a config: a file and overrides of its metadata.

    ``where_present``, which ``layers: all`` sets: the steer acts in those of its layers that have
    its site.
    """

    path: Path
    where_present: bool = False

    @model_validator(mode="before")
    @classmethod
    def _every_layer(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            if "where_present" in data:
                raise ValueError("where_present is no key of a steer; write layers: all")
            if data.get("layers") == ALL_LAYERS:
                return {**data, "layers": None, "where_present": True}
        return data

    @property
    def overrides(self) -> dict[str, Any]:
        """The overrides for ``load_steer``; an infinite bound is a text, as JSON has none."""
        values = self.model_dump(exclude={"path", "where_present"}, exclude_none=True)
        return {
            name: str(value) if isinstance(value, float) and math.isinf(value) else value
            for name, value in values.items()
        }


class Limits(BaseModel):
    """Limits for requests and steers; ``max_strength`` None means unlimited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steers: PositiveInt = 32
    max_rank: PositiveInt = 1024
    max_steers_per_request: PositiveInt = 4
    max_strength: PositiveFloat | None = None


class SteerConfig(BaseModel):
    """A steer config, checked as a whole. Paths are absolute once it is loaded.

    ``steers`` maps names to files, ``presets`` names to mixes of steers (a strength each, or
    options as in a request). ``default`` is the steer string or preset of requests without one.
    ``limits`` bounds what is admitted. ``kernels`` is what steers run on: ``triton``, ``torch``, or
    ``auto`` for Triton on CUDA, else torch. ``untested`` says what becomes of steers inside the
    layers of a model whose sites only the self-test has found: ``warn`` or ``refuse``. ``runtime``
    says whether steers may be loaded while the engine serves; ``steers`` may be empty then.
    ``playground`` makes a server answer ``GET /steer`` with a page to try the steers on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steers: dict[str, SteerEntry] = {}
    presets: dict[str, dict[str, MixEntry]] = {}
    default: str = NO_STEER
    limits: Limits = Limits()
    kernels: Kernels = "auto"
    untested: Untested = "warn"
    playground: StrictBool = False
    runtime: RuntimeConfig = RuntimeConfig()

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Any] | SteerConfig") -> "SteerConfig":
        """Read a config from a YAML or JSON file, from inline JSON or from a dict.

        Relative steer paths are relative to the config file, or to the working folder for inline
        JSON and dicts. Raises ``SteerError`` that names the place, the value and what is expected.
        """
        if isinstance(source, SteerConfig):
            return source
        data, folder, origin = _read_source(source)
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise SteerError(describe_errors(error, origin)) from None
        return config._with_paths_from(folder)

    @field_validator("steers", "presets")
    @classmethod
    def _names_fit_the_grammar(cls, mapping: dict[str, Any]) -> dict[str, Any]:
        for name in mapping:
            if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or name == NO_STEER:
                raise ValueError(
                    f"{shown(name)} cannot be a name: letters, digits, '_', '.', '-' are allowed, "
                    f"at most {LONGEST_NAME}, and {NO_STEER!r} means no steer"
                )
        return mapping

    @model_validator(mode="after")
    def _parts_agree(self) -> "SteerConfig":
        if not self.steers and not self.runtime.enabled:
            if "steers" not in self.model_fields_set:
                raise ValueError(
                    "key 'steers' is missing; name at least one steer, or set runtime: "
                    "{enabled: true} to load them while the engine serves"
                )
            raise ValueError(
                "steers is empty; name at least one steer, set runtime: {enabled: true} to load "
                "them while the engine serves, or leave the config away"
            )
        if len(self.steers) > self.limits.max_steers:
            raise ValueError(
                f"{len(self.steers)} steers are configured; limits.max_steers is "
                f"{self.limits.max_steers}"
            )
        both = sorted(set(self.steers) & set(self.presets))
        if both:
            raise ValueError(f"{listed(both)} names a steer and a preset; choose two names")
        for preset, mix in self.presets.items():
            unknown = sorted(set(mix) - set(self.steers))
            if unknown:
                raise ValueError(
                    f"preset {preset} names {listed(unknown)}; steers: "
                    f"{listed(sorted(self.steers))}"
                )
        return self

    def _with_paths_from(self, folder: Path) -> "SteerConfig":
        steers = {
            name: entry.model_copy(update={"path": _absolute(folder, entry.path, f"steer {name}")})
            for name, entry in self.steers.items()
        }
        return self.model_copy(update={"steers": steers, "runtime": self._runtime_from(folder)})

    def _runtime_from(self, folder: Path) -> RuntimeConfig:
        """The part ``runtime`` with absolute paths."""
        folders = [_absolute(folder, path, "runtime.folders") for path in self.runtime.folders]
        state = self.runtime.state
        return self.runtime.model_copy(
            update={
                "folders": tuple(folders),
                "state": None if state is None else _absolute(folder, state, "runtime.state"),
            }
        )


def _absolute(folder: Path, path: Path, subject: str) -> Path:
    try:
        return (folder / path.expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise SteerError(f"{subject}: {shown(path)} cannot be a path: {error}") from None


def _read_source(source: str | Path | Mapping[str, Any]) -> tuple[Any, Path, str]:
    """The config's data, the folder its paths start from, and its name in messages."""
    if isinstance(source, Mapping):
        check_nesting(source, "steer config")
        return dict(source), Path.cwd(), "steer config"
    if not isinstance(source, str | Path):
        raise SteerError(
            f"steer config is {shown(source)}; expected a path to YAML or JSON, inline JSON, or a "
            "dict"
        )
    if isinstance(source, str) and source.lstrip().startswith("{"):
        if len(source) > LARGEST:
            raise SteerError(f"inline steer config is longer than {LARGEST} characters")
        return read_json(source, "inline steer config"), Path.cwd(), "steer config"
    path = _absolute(Path.cwd(), Path(source), "steer config")
    origin = f"steer config {printable(str(source), _LONGEST_PATH)}"
    if not os.path.isfile(path):  # unlike Path.is_file no error for a name that is too long
        problem = "is a folder" if os.path.isdir(path) else "no such file"
        raise SteerError(f"{origin}: {problem}")
    try:
        data = read_config_file(path, f"steer config {path}")
    except OSError as error:
        raise SteerError(f"{origin} cannot be read: {error.strerror}") from None
    if not isinstance(data, Mapping):
        raise SteerError(
            f"steer config {path} is not a mapping; expected at least the key 'steers'"
        )
    return data, path.parent, str(path)
