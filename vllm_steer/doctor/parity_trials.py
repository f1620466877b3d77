"""The trials of one engine: its steers, what its requests ask for, and the prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vllm_steer.doctor.engine_process import Setting
from vllm_steer.doctor.reading_trials import GATED
from vllm_steer.request.gates import CONDITION
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class ParityTrials:
    """The trials of one engine: its steers, the options of the trial that is named like its steer,
    and the prompts. ``not_tested`` has trials that the engine refuses, with the reason.
    """

    steers: Mapping[str, Steer]
    options: Mapping[str, float | Mapping[str, Any]]
    prompts: Sequence[list[int]]
    not_tested: Mapping[str, str] = field(default_factory=dict)

    @property
    def batches(self) -> dict[str, list[Setting]]:
        """The settings of the three batches."""
        return {
            "unsteered": [{}],
            "zero": [{name: _at_zero(options) for name, options in self.options.items()}],
            "large": [{name: options} for name, options in self.options.items()],
        }


def _at_zero(options: float | Mapping[str, Any]) -> float | dict[str, Any]:
    return {**options, "strength": 0.0} if isinstance(options, Mapping) else 0.0


_REFUSED_WITH_CONDITIONS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "pipeline_parallel_size": lambda value: value > 1,
    "kv_transfer_config": lambda value: value is not None,
}
"""Options of an engine that does not start with a condition, and their values that say so."""


def without_refused(trials: ParityTrials, options: Mapping[str, Any]) -> ParityTrials:
    """The trials without those that an engine with these options refuses."""
    refused = [
        name
        for name, is_on in _REFUSED_WITH_CONDITIONS.items()
        if name in options and is_on(options[name])
    ]
    if not refused or GATED not in trials.steers:
        return trials
    reason = f"the engine refuses conditions with {', '.join(refused)}"
    steers = {n: steer for n, steer in trials.steers.items() if n not in (GATED, CONDITION)}
    kept = {name: value for name, value in trials.options.items() if name in steers}
    return ParityTrials(steers, kept, trials.prompts, {GATED: reason})
