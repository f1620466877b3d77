"""The sizes of a model's activations, and first strengths for the steers of a config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from vllm_steer.config import SteerConfig
from vllm_steer.doctor.architecture import Architecture
from vllm_steer.doctor.finding import Finding
from vllm_steer.doctor.memory import mismatch
from vllm_steer.doctor.reference import load_model
from vllm_steer.doctor.trials import prompts
from vllm_steer.errors import SteerError, cause
from vllm_steer.files import load_steer
from vllm_steer.fit.relative_size import median_norms, read_activations, relative_size
from vllm_steer.models import load_tokenizer
from vllm_steer.steers import ConditionSteer, LMSteer, Steer
from vllm_steer.steers.sites import LAYER_SITES

PART: Final = "sizes"


def sizes(
    architecture: Architecture, steer_config: str | Path | None, dtype: str
) -> Iterator[Finding]:
    """Findings on the median length of activations at ``resid`` and at the sites of the steers,
    and on how much of that each steer changes at strength 1.

    The model reads a few short texts in Transformers. Raises ``SteerError`` for a config or a steer
    file that cannot be read.
    """
    steers = {} if steer_config is None else _steers_of(architecture, steer_config)
    used = {"resid", *(steer.site for steer in steers.values())}
    try:
        activations = _read(architecture, used, dtype)
    except (SteerError, torch.OutOfMemoryError) as error:
        reason = str(error) if isinstance(error, SteerError) else f"out of memory: {cause(error)}"
        yield Finding(PART, "activations", "not tested", reason)
        return
    for site, by_layer in activations.items():
        yield _norms(site, median_norms(by_layer))
    for name, steer in steers.items():
        if isinstance(steer, LMSteer | ConditionSteer):
            continue
        size = relative_size(steer, activations[steer.site])
        figures = {"default_strength": steer.default_strength, **size.data}
        yield Finding(PART, name, "-", size.message, figures)


def _steers_of(architecture: Architecture, steer_config: str | Path) -> dict[str, Steer]:
    """The steers of a config that fit the model."""
    entries = sorted(SteerConfig.load(steer_config).steers.items())
    steers = {name: load_steer(entry.path, **entry.overrides) for name, entry in entries}
    return {name: steer for name, steer in steers.items() if not mismatch(architecture, steer)}


def _read(
    architecture: Architecture, used: set[str], dtype: str
) -> dict[str, Mapping[int, torch.Tensor]]:
    """By site the activations of each layer; sites that the model lacks are left out."""
    try:
        tokenizer = load_tokenizer(architecture.name)
    except SteerError:
        tokenizer = None
    texts = prompts(architecture, tokenizer)
    model = load_model(architecture.name, dtype)
    present = [site for site in LAYER_SITES if site in used and site in architecture.widths]
    return {site: read_activations(model, texts, site) for site in present}


def _norms(site: str, norms: Mapping[int, float]) -> Finding:
    first, last = min(norms), max(norms)
    low, high = min(norms.values()), max(norms.values())
    message = (
        f"{norms[first]:.3g} in layer {first}, {norms[last]:.3g} in layer {last}; {low:.3g} to "
        f"{high:.3g} in all"
    )
    return Finding(PART, f"|h| at {site}", "-", message, {"layers": dict(norms)})
