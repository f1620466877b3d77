"""How much a steer changes activations, relative to the model's own: to choose a first strength.

    share = median over tokens of |c(h)| / |h|

``c(h)`` is what a steer adds to the activation ``h`` at its site at strength 1: ``w`` of a vector
that is added, ``w/|w|`` of one that rotates. The change of the kinds with a strength is
proportional to it, so ``0.1 / share`` changes activations by a tenth of their length.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import all_layers, context_length, recorded
from vllm_steer.hf import sites
from vllm_steer.hf.layers import LayerSteer, change_at
from vllm_steer.hf.token_positions import PassPositions
from vllm_steer.steers import DeltaSteer

SHARES: Final = (0.1, 0.5)
"""A change that is seen in most texts, and one that most models do not bear in many layers."""
SHORT_TEXTS: Final = (
    "The first thing that I noticed was",
    "Paris is a city in",
    "1, 2, 3, 4,",
    "She opened the letter and",
)
"""Texts to measure activations on where a user gives none."""
_MOST_TOKENS: Final = 256
_MOST_SHOWN: Final = 8
_MOST_TEXTS: Final = 16


@dataclass(frozen=True)
class LayerSize:
    """Medians over tokens in one layer: ``|h|``, ``|c(h)|`` at strength 1, and ``|c(h)| / |h|``."""

    activation: float
    change: float
    share: float


@dataclass(frozen=True)
class RelativeSize:
    """The sizes of a steer in its layers.

    ``is_set`` is whether the change sets a value, at strength 1, and is no multiple of a vector:
    modes ``project`` and ``clamp``. Such a steer has no strength for a share.
    """

    layers: Mapping[int, LayerSize]
    is_set: bool = False

    @property
    def share(self) -> float:
        """The median share of the layers."""
        return median(size.share for size in self.layers.values())

    def strength_for(self, share: float) -> float | None:
        """The strength that changes activations by a share of their length in the median layer;
        None if there is none.
        """
        return None if self.is_set or self.share == 0 else share / self.share

    @property
    def data(self) -> dict[str, Any]:
        """The sizes by layer and the strengths for ``SHARES``, as plain data."""
        return {
            "share": self.share,
            "strength_for_share": {str(share): self.strength_for(share) for share in SHARES},
            "layers": {str(layer): vars(size) for layer, size in self.layers.items()},
        }

    @property
    def message(self) -> str:
        """The share and the strengths in words."""
        shares = {layer: size.share for layer, size in self.layers.items()}
        text = f"{self.share:.3g} of |h| at strength 1"
        if 1 < len(shares) <= _MOST_SHOWN:
            by_layer = ", ".join(f"{layer}: {share:.3g}" for layer, share in shares.items())
            text += f" (layer {by_layer})"
        elif len(shares) > 1:
            text += f" ({min(shares.values()):.3g} to {max(shares.values()):.3g} by layer)"
        for share in SHARES:
            strength = self.strength_for(share)
            if strength is not None:
                text += f"; {share:g} at strength {strength:.3g}"
        return text


@torch.no_grad()
def read_activations(
    model: Any, texts: Sequence[Sequence[int]], site: str
) -> dict[int, torch.Tensor]:
    """By layer the activations of a few texts at a site, ``[tokens, width]``, float32 (float64 of a
    float64 model).

    ``texts`` are token ids, cut off at the model's context. Without the first token of each, which
    dwarfs all others in many models, where there are others; after 256 tokens the rest is left out.
    Raises ``SteerError`` for a model without the site, and for texts without tokens.
    """
    layers, parts, remaining = all_layers(model), [], _MOST_TOKENS
    for ids in texts:
        cut = list(ids)[: context_length(model, remaining + 1)]
        if remaining <= 0 or not cut:
            continue
        pick = partial(_behind, first=1 if len(cut) > 1 else 0)
        with recorded(model, site, layers, pick) as recording:
            model(input_ids=torch.tensor([cut], device=model.device), use_cache=False)
        parts.append(recording.stacked())
        remaining -= len(parts[-1])
    if not parts:
        raise SteerError("the texts have no tokens, so no activation can be measured")
    stacked = torch.cat(parts)
    return {layer: stacked[:, index] for index, layer in enumerate(layers)}


def _behind(x: torch.Tensor, *, first: int) -> torch.Tensor:
    return x[0, first:]


def relative_size(steer: LayerSteer, activations: Mapping[int, torch.Tensor]) -> RelativeSize:
    """The sizes of a steer for the activations of its site, from ``read_activations``."""
    layers = {layer: _layer_size(steer, layer, activations[layer]) for layer in steer.layers}
    return RelativeSize(layers, is_set=getattr(steer, "has_bounds", False))


def size_on_texts(
    model: Any, tokenizer: Any, steer: LayerSteer, texts: Iterable[str]
) -> RelativeSize:
    """The sizes of a steer on the first of some texts, each with the tokenizer's special tokens.

    Raises ``SteerError`` for a model that lacks the steer's site or layers, or of another width.
    """
    _check_fits(model, steer)
    ids = [tokenizer(text)["input_ids"] for text in itertools.islice(texts, _MOST_TEXTS)]
    return relative_size(steer, read_activations(model, ids, steer.site))


def _check_fits(model: Any, steer: LayerSteer) -> None:
    names, blocks = sites.family(model), sites.layers_of(model)
    sites.check_layers_exist(steer.layers, len(blocks))
    width = sites.site_width(model, blocks[steer.layers[0]], names, steer.site)
    if steer.hidden_size != width:
        raise SteerError(
            f"the steer is {steer.hidden_size} wide, and the site {steer.site} of this model is "
            f"{width}; give the model that the steer is for"
        )


def median_norms(activations: Mapping[int, torch.Tensor]) -> dict[int, float]:
    """By layer the median length of the activations."""
    return {layer: float(x.norm(dim=-1).median()) for layer, x in activations.items()}


def _layer_size(steer: LayerSteer, layer: int, x: torch.Tensor) -> LayerSize:
    norms = x.norm(dim=-1)
    if isinstance(steer, DeltaSteer):  # a row per generation step, whatever the token is
        changes = steer.delta[:, steer.layers.index(layer)].to(x).norm(dim=-1).median().expand(1)
    else:
        positions = PassPositions(torch.arange(len(x)), len(x))
        changes = change_at(steer, layer, low=None, high=None)(x, positions).norm(dim=-1)
    shares = changes / norms.clamp_min(torch.finfo(x.dtype).tiny)
    return LayerSize(*(float(values.median()) for values in (norms, changes, shares)))
