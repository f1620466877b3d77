"""A model's sizes and sites from its config, without weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from vllm_steer.doctor.finding import Finding
from vllm_steer.errors import SteerError, cause
from vllm_steer.families import NOT_TESTED
from vllm_steer.hf import sites
from vllm_steer.hf.language_model import auto_class, text_config
from vllm_steer.models import model_path
from vllm_steer.steers.sites import LAYER_SITES

PART = "model"
_SOFT_CAPS: Final = ("final_logit_softcapping",)
_SCALES: Final = ("logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Architecture:
    """A model without weights: ``model`` is on the meta device, ``widths`` has the width of each
    site.

    ``reasons`` has the reason for each site that the model lacks.
    """

    name: str
    model: Any
    widths: dict[str, int]
    reasons: dict[str, str]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(text_config(self.model).vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the config; float32 if it has none."""
        return self.model.config.dtype or text_config(self.model).dtype or torch.float32

    @property
    def longest(self) -> int:
        """The maximum number of positions; a large number if the config has none."""
        return int(getattr(text_config(self.model), "max_position_embeddings", None) or 1 << 30)


def read_architecture(name: str) -> Architecture:
    """Read a model's architecture from its config.

    Raises ``SteerError`` if the model does not exist or is not a causal language model of
    Transformers.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(name))
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise SteerError(f"model {name}: cannot be read ({cause(error)})") from error
    widths: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for site in LAYER_SITES:
        try:
            widths[site] = _width(model, site)
        except SteerError as error:
            # The rest of the message lists the supported models.
            reasons[site] = str(error).partition("; steers at the LM head work")[0]
    return Architecture(name, model, widths, reasons)


def _width(model: Any, site: str) -> int:
    names, layers = sites.family(model), sites.layers_of(model)
    return sites.site_width(model, layers[0], names, site)


def describe(architecture: Architecture) -> Iterator[Finding]:
    """Findings on the model's sizes, LM head and sites."""
    config = architecture.model.config
    names = config.architectures or [type(architecture.model).__name__]
    yield Finding(PART, "architecture", "-", ", ".join(names))
    sizes = {
        "hidden_size": architecture.hidden_size,
        "layers": architecture.num_layers,
        "vocab_size": architecture.vocab_size,
    }
    text = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())
    yield Finding(PART, "sizes", "-", f"{text}, {_short(architecture.dtype)}", sizes)
    yield _head(architecture.model)
    yield _head_site(architecture)
    for site in LAYER_SITES:
        if site in architecture.widths:
            width = architecture.widths[site]
            yield Finding(PART, f"site {site}", "ok", f"{width} wide", {"width": width})
        else:
            yield _lacking(site, architecture.reasons[site])


def _lacking(site: str, reason: str) -> Finding:
    if NOT_TESTED not in reason:
        return Finding(PART, f"site {site}", "missing", reason)
    text = "not in the table of models; an engine looks for it in a self-test when it starts"
    return Finding(PART, f"site {site}", "not tested", text)


def head_of(model: Any) -> nn.Module | None:
    """A model's LM head; None if it has none."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _head_site(architecture: Architecture) -> Finding:
    if head_of(architecture.model) is None:
        return Finding(PART, "site head", "missing", "the model has no LM head")
    return Finding(PART, "site head", "ok", f"{architecture.hidden_size} wide")


def _head(model: Any) -> Finding:
    head, config = head_of(model), text_config(model)
    figures = {
        "bias": getattr(head, "bias", None) is not None,
        "tied": bool(getattr(model.config, "tie_word_embeddings", False)),
        "soft_cap": _first(config, _SOFT_CAPS),
        "logit_scale": _first(config, _SCALES),
    }
    parts = [
        "tied to the embeddings" if figures["tied"] else "not tied",
        "with a bias" if figures["bias"] else "no bias",
        f"soft cap {figures['soft_cap']:g}" if figures["soft_cap"] else "no soft cap",
        f"logit scale {figures['logit_scale']:g}" if figures["logit_scale"] else "no logit scale",
    ]
    return Finding(PART, "LM head", "-", ", ".join(parts), figures)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = [getattr(config, name, None) for name in names]
    return next((float(value) for value in values if value is not None), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
