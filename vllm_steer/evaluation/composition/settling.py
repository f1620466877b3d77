"""What is settled before anything is written: the doses, and what decides the texts."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from vllm_steer.digest import file_digest
from vllm_steer.evaluation.composition.asked import Composition, label
from vllm_steer.evaluation.composition.candidates import choices
from vllm_steer.evaluation.composition.comparison import Comparison
from vllm_steer.request import read_dose
from vllm_steer.steers import Steer
from vllm_steer.steers.content import content_digest

_VERSIONS: Final = ("torch", "vllm")


def check_doses(asked: Composition, steers: Mapping[str, Steer]) -> None:
    """Raise ``SteerError`` for a dose that a request could not have."""
    for method in asked.methods:
        for choice in choices(method, asked, steers):
            for name, dose in choice.doses.items():
                read_dose(name, dose, steers[name])


def about_comparison(
    given: Comparison, asked: Composition, steers: Mapping[str, Steer]
) -> dict[str, Any]:
    """All that decides the texts of a request; combinations and strengths may be added."""
    from vllm_steer.version import __version__

    return {
        "model": given.model,
        "steers": {
            name: {
                "file": asked.properties[name].steer.name,
                "kind": steer.kind,
                "sha256": content_digest(steer),
            }
            for name, steer in steers.items()
        },
        "prompts": given.prompts.settings,
        "choosing_prompts": None if given.choosing is None else given.choosing.settings,
        "examples": {label(c): file_digest(path) for c, path in asked.examples.items()},
        "demonstrations": asked.demonstrations,
        "instruction": asked.instruction,
        "sampling": given.sampling.settings,
        "engine": given.engine.decisive,
        "versions": {"vllm-steer": __version__, **{name: version(name) for name in _VERSIONS}},
    }
