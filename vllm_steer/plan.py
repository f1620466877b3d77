"""The plan: the checked steers of an engine, fixed at start-up.

A steer's content enters it as a digest, so the same steers saved again make the same plan. It is
plain JSON, travels to every process inside vLLM's ``additional_config`` and so enters vLLM's
configuration hash: a compile cache made under another plan is never taken for this one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from vllm_steer.config import Limits, SteerConfig, SteerEntry, Untested
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.kernels.dispatch import Kernels
from vllm_steer.request import DoseCache, check_request, resolve
from vllm_steer.steers import DeltaSteer, LMSteer, Mode, Schedule, Steer, VectorSteer
from vllm_steer.steers.content import content_digest


class PlannedSteer(BaseModel):
    """A checked steer: its path, its properties and the digest of its content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    overrides: dict[str, Any]
    kind: str
    site: str
    hidden_size: int | None
    vocab_size: int | None = None
    layers: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    steps: int | None = None
    mode: Mode | None = None
    default_strength: float
    content: str
    where_present: bool = False

    def load(self) -> Steer:
        """Read the steer again, in a process that has only the plan.

        Raises ``SteerError`` if the file is gone or is no longer the one that was checked.
        """
        steer = load_steer(self.path, **self.overrides)
        if content_digest(steer) != self.content:
            raise SteerError(f"{self.path}: the file changed while the engine was starting")
        return steer


class SteerPlan(BaseModel):
    """The steers, presets, default, limits and kernels of one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    kernels: Kernels
    steers: dict[str, PlannedSteer]
    presets: dict[str, dict[str, float | str | dict[str, Any]]]
    default: str
    limits: Limits
    untested: Untested = "warn"
    playground: bool = False
    _resolved: DoseCache = PrivateAttr(default_factory=DoseCache)

    @classmethod
    def of(cls, config: SteerConfig) -> "SteerPlan":
        """Load and check every steer of a config."""
        from vllm_steer.version import __version__

        plan = cls(
            version=__version__,
            kernels=config.kernels,
            steers={
                name: _plan_steer(name, entry, config.limits)
                for name, entry in sorted(config.steers.items())
            },
            presets=config.presets,
            default=config.default,
            limits=config.limits,
            untested=config.untested,
            playground=config.playground,
        )
        for preset in plan.presets:
            check_request(preset, plan, source=f"preset {preset}")
        check_request(plan.default, plan, source="default")
        return plan

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SteerPlan":
        """Restore a plan in a worker or in the engine core."""
        return cls.model_validate(data)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for ``additional_config``, the same on every rank."""
        return self.model_dump(mode="json")

    @property
    def sites(self) -> frozenset[str]:
        """The sites that the steers act at."""
        return frozenset(steer.site for steer in self.steers.values())

    def doses(self, value: Any) -> tuple[Dose, ...]:
        """The doses for a request's ``steer`` value, resolved once; None takes the default."""
        value = self.default if value is None else value
        return self._resolved.get(value, lambda value: resolve(value, self))


def is_plan(data: Any) -> bool:
    """Whether ``additional_config["steer"]`` is a resolved plan and not yet a user's config."""
    return isinstance(data, Mapping) and {"version", "kernels", "steers"} <= set(data)


def _plan_steer(name: str, entry: SteerEntry, limits: Limits) -> PlannedSteer:
    try:
        steer = load_steer(entry.path, **entry.overrides)
    except SteerError as error:
        raise SteerError(f"steer {name}: {error}") from error
    vocab_size = None
    if isinstance(steer, LMSteer):
        if entry.where_present:
            raise SteerError(
                f"steer {name}: layers does not apply to a steer of kind {steer.kind}; drop it"
            )
        vocab_size = steer.vocab_size
        if steer.rank > limits.max_rank:
            raise SteerError(
                f"steer {name}: {entry.path}: rank is {steer.rank}; limits.max_rank is "
                f"{limits.max_rank}"
            )
    return PlannedSteer(
        path=entry.path,
        overrides=entry.overrides,
        kind=steer.kind,
        site=steer.site,
        hidden_size=steer.hidden_size if vocab_size is None else None,
        vocab_size=vocab_size,
        layers=steer.layers,
        schedule=steer.schedule,
        steps=steer.steps if isinstance(steer, DeltaSteer) else None,
        mode=steer.mode if isinstance(steer, VectorSteer) else None,
        default_strength=1.0 if steer.default_strength is None else steer.default_strength,
        content=content_digest(steer),
        where_present=entry.where_present,
    )
