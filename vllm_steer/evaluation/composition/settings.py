"""The settings of a comparison, and the checks and metadata derived from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from vllm_steer.digest import file_digest
from vllm_steer.evaluation.composition.candidates import choices
from vllm_steer.evaluation.composition.spec import ComparisonSpec, label
from vllm_steer.evaluation.dose_options import check_dose, conditions_metadata
from vllm_steer.evaluation.generation import EngineOptions
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.steers import ConditionSteer, Steer
from vllm_steer.steers.content import content_digest

_VERSIONS: Final = ("torch", "vllm")


@dataclass(frozen=True)
class ComparisonSettings:
    """What to compare: model, specification file, prompts, judges, sampling and engine options.

    Strengths and options are selected on ``selection_prompts``, or on ``prompts`` without them.
    ``tolerance`` is that of ``choose``. ``judges`` score whole texts; perplexity by the model
    itself and diversity are added unless a judge of that kind is given. ``folder`` is the run
    folder; ``restart`` discards a run in it.
    """

    model: str
    file: Path
    prompts: Prompts
    folder: Path
    selection_prompts: Prompts | None = None
    judges: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: float = 0.02
    engine: EngineOptions = field(default_factory=EngineOptions)
    restart: bool = False

    @property
    def specs(self) -> tuple[str, ...]:
        """The judge specifications: default ones first, then those given."""
        kinds = {spec.partition(":")[0] for spec in self.judges}
        usual = {"perplexity": f"perplexity:{self.model}", "diversity": "diversity"}
        return (*(spec for kind, spec in usual.items() if kind not in kinds), *self.judges)


def check_doses(
    spec: ComparisonSpec,
    steers: Mapping[str, Steer],
    conditions: Mapping[str, ConditionSteer] | None = None,
) -> None:
    """Raise ``SteerError`` for a dose that is invalid in a request."""
    for method in spec.methods:
        for choice in choices(method, spec, steers):
            for name, dose in choice.doses.items():
                check_dose(name, dose, steers[name], conditions or {})


def comparison_metadata(
    settings: ComparisonSettings,
    spec: ComparisonSpec,
    steers: Mapping[str, Steer],
    conditions: Mapping[str, ConditionSteer] | None = None,
) -> dict[str, Any]:
    """Everything that determines the texts of a request: the settings of the run.

    Combinations and strengths are not part of it, so a later run may add some.
    """
    from vllm_steer.version import __version__

    return {
        "model": settings.model,
        "steers": {
            name: {
                "file": spec.properties[name].steer.name,
                "kind": steer.kind,
                "sha256": content_digest(steer),
            }
            for name, steer in steers.items()
        },
        **conditions_metadata(conditions or {}, spec.conditions),
        "prompts": settings.prompts.settings,
        "choosing_prompts": None
        if settings.selection_prompts is None
        else settings.selection_prompts.settings,
        "examples": {label(c): file_digest(path) for c, path in spec.examples.items()},
        "demonstrations": spec.demonstrations,
        "instruction": spec.instruction,
        "sampling": settings.sampling.settings,
        "engine": settings.engine.output_affecting,
        "versions": {"vllm-steer": __version__, **{name: version(name) for name in _VERSIONS}},
    }
