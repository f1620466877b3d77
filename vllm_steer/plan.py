"""The plan: the checked steers of an engine, fixed at start-up.

A steer's content enters it as a digest, so the same steers saved again make the same plan. It is
plain JSON, travels to every process inside vLLM's ``additional_config`` and so enters vLLM's
configuration hash: a compile cache made under another plan is never taken for this one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from vllm_steer.config import Limits, SteerConfig, Untested
from vllm_steer.doses import Dose, Gate
from vllm_steer.kernels.dispatch import Kernels
from vllm_steer.loaded_steers import LoadedSteers
from vllm_steer.planned_steer import PlannedSteer, plan_steer
from vllm_steer.request import DoseCache, check_request, resolve
from vllm_steer.runtime_config import RuntimeConfig
from vllm_steer.steers.sites import HEAD

__all__ = ["PlannedSteer", "SteerPlan", "is_plan"]


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
    runtime: RuntimeConfig = RuntimeConfig()
    _loaded: LoadedSteers = PrivateAttr(default_factory=LoadedSteers)
    _resolved: DoseCache = PrivateAttr(default_factory=DoseCache)

    @classmethod
    def of(cls, config: SteerConfig) -> "SteerPlan":
        """Load and check every steer of a config."""
        from vllm_steer.version import __version__

        plan = cls(
            version=__version__,
            kernels=config.kernels,
            steers={
                name: plan_steer(name, entry, config.limits)
                for name, entry in sorted(config.steers.items())
            },
            presets=config.presets,
            default=config.default,
            limits=config.limits,
            untested=config.untested,
            playground=config.playground,
            runtime=config.runtime,
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

    @property
    def loaded(self) -> LoadedSteers:
        """The steers that this process knows beside those of the config."""
        return self._loaded

    @property
    def has_conditions(self) -> bool:
        """Whether requests may have conditions: of the config, or loaded at run time."""
        is_reserved = self.runtime.enabled and self.runtime.room.has_conditions
        return is_reserved or any(s.condition is not None for s in self.steers.values())

    @property
    def layer_sites(self) -> frozenset[str]:
        """The sites inside the layers that the steers act at, or have room to act at."""
        room = self.runtime.room.layer_sites if self.runtime.enabled else ()
        return (self.sites | set(room)) - {HEAD}

    def steer_of(self, dose: Dose) -> PlannedSteer:
        """The steer of a dose that this plan has resolved."""
        return self.steers[dose.steer] if dose.key is None else self._loaded[dose.key]

    def conditions_of(self, gate: Gate) -> Sequence[PlannedSteer]:
        """The conditions of a gate that this plan has resolved."""
        keys = dict(gate.keys)
        return [
            self._loaded[keys[name]] if name in keys else self.steers[name]
            for name in gate.conditions
        ]

    def doses(self, value: Any, loaded: Mapping[str, str] | None = None) -> tuple[Dose, ...]:
        """The doses for a request's ``steer`` value, resolved once; None takes the default.

        ``loaded`` has the keys of steers that were loaded at run time by the names that they have
        in this request.
        """
        value = self.default if value is None else value
        if not loaded:
            return self._resolved.get(value, lambda value: resolve(value, self))
        names, resolved = self._loaded.names(loaded, self)
        return resolved.get(value, lambda value: resolve(value, names))


def is_plan(data: Any) -> bool:
    """Whether ``additional_config["steer"]`` is a resolved plan and not yet a user's config."""
    return isinstance(data, Mapping) and {"version", "kernels", "steers"} <= set(data)
