"""The resolved plan: everything about an engine's steers that is settled at start-up.

It is plain JSON, travels to every process inside vLLM's ``additional_config`` and so enters vLLM's
configuration hash: a compile cache made under another plan is never taken for this one.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_steer.config import Limits, SteerConfig, SteerEntry
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.request import check_request, resolve
from vllm_steer.steers import Steer

OPERATION = "lm_steer/torch"


class PlannedSteer(BaseModel):
    """One steer as the plan fixes it: where it lies, what it is, which bytes it had."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    facts: dict[str, Any]
    kind: str
    site: str
    variant: str
    hidden_size: int
    vocab_size: int | None
    rank: int
    columns: int
    default_strength: float
    sha256: str

    def load(self) -> Steer:
        """Read the steer again, in a process that has only the plan.

        Raises ``SteerError`` if the file is gone or is no longer the one that was checked.
        """
        steer = load_steer(self.path, **self.facts)
        if _sha256(self.path) != self.sha256:
            raise SteerError(f"{self.path}: the file changed while the engine was starting")
        return steer


class SteerPlan(BaseModel):
    """The steers, presets, default and limits of one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    operation: str
    steers: dict[str, PlannedSteer]
    presets: dict[str, dict[str, float]]
    default: str
    limits: Limits

    @classmethod
    def of(cls, config: SteerConfig) -> "SteerPlan":
        """Load and check every steer of a config once, and keep what requests and workers need."""
        from vllm_steer import __version__

        plan = cls(
            version=__version__,
            operation=OPERATION,
            steers={
                name: _plan_steer(name, entry, config.limits)
                for name, entry in sorted(config.steers.items())
            },
            presets=config.presets,
            default=config.default,
            limits=config.limits,
        )
        for preset in plan.presets:
            check_request(preset, plan, place=f"preset {preset}")
        check_request(plan.default, plan, place="default")
        return plan

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SteerPlan":
        """The plan as it arrived in a worker or in the engine core."""
        return cls.model_validate(data)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for ``additional_config``, the same on every rank."""
        return self.model_dump(mode="json")

    def doses(self, asked: Any) -> dict[str, float]:
        """Steer names to strengths for a request's ``steer`` value; None takes the default."""
        return resolve(self.default if asked is None else asked, self)


def is_plan(data: Any) -> bool:
    """Whether ``additional_config["steer"]`` is a resolved plan and not yet a user's config."""
    return isinstance(data, Mapping) and {"version", "operation", "steers"} <= set(data)


def _plan_steer(name: str, entry: SteerEntry, limits: Limits) -> PlannedSteer:
    try:
        steer = load_steer(entry.path, **entry.facts)
    except SteerError as error:
        raise SteerError(f"steer {name}: {error}") from error
    if steer.rank > limits.max_rank:
        raise SteerError(
            f"steer {name}: {entry.path}: rank is {steer.rank}; limits.max_rank is "
            f"{limits.max_rank}"
        )
    return PlannedSteer(
        path=entry.path,
        facts=entry.facts,
        kind=steer.kind,
        site=steer.site,
        variant=steer.variant,
        hidden_size=steer.hidden_size,
        vocab_size=steer.vocab_size,
        rank=steer.rank,
        columns=steer.columns,
        default_strength=1.0 if steer.default_strength is None else steer.default_strength,
        sha256=_sha256(entry.path),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
