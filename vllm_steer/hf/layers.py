"""Vectors and deltas: the sites inside the decoder layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.hf import sites
from vllm_steer.hf.token_positions import PassPositions, PositionTracker, coefficients
from vllm_steer.steers import DeltaSteer, VectorSteer

LayerSteer = VectorSteer | DeltaSteer


@dataclass(frozen=True)
class LayerDose:
    """One dose in one layer: ``rows [steps, width]``, or one row for all tokens of a vector."""

    dose: Dose
    rows: torch.Tensor
    num_steps: int | None
    rotates: bool

    def changes(self, span: PassPositions, wide: torch.Tensor) -> torch.Tensor:
        """``a_t w [tokens, width]``, dtype and device those of ``wide``."""
        a = coefficients(self.dose, span, self.num_steps)[:, None].to(wide)
        if self.num_steps is None:
            return a * self.rows.to(wide)
        return a * self.rows[span.steps.clamp(0, self.num_steps - 1)].to(wide)

    def acts(self, span: PassPositions) -> torch.Tensor:
        """On which tokens, ``[tokens]`` bool."""
        return coefficients(self.dose, span, self.num_steps) != 0


def hook_layers(
    model: nn.Module, doses: Sequence[tuple[Dose, LayerSteer]], tracker: PositionTracker
) -> Iterator[RemovableHandle]:
    """Steer the layers of ``model`` by every dose; ``SteerError`` for one that does not fit it."""
    names, layers = sites.family(model), sites.layers_of(model)
    for (site, layer), terms in _layer_doses(doses, len(layers)).items():
        width = sites.site_width(model, layers[layer], names, site)
        for term in terms:
            _check_width(term, width, site)
        yield sites.attach(layers[layer], names, site, _SiteHook(terms, tracker))


def steer_tokens(
    x: torch.Tensor, changes: torch.Tensor, acting: torch.Tensor, turning: torch.Tensor
) -> torch.Tensor:
    """``x + changes``, at the norm of ``x`` where a token is ``turning``, rounded once.

    Shapes: ``x [..., tokens, width]``, ``changes [tokens, width]`` in the dtype of the sums,
    ``acting`` and ``turning`` ``[tokens]`` bool. A token that is not ``acting`` keeps every bit.
    """
    wide = sites.widened(x)
    steered = wide + changes
    norm = steered.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    turned = steered / norm * wide.norm(dim=-1, keepdim=True)
    steered = torch.where(turning[:, None], turned, steered)
    return torch.where(acting[:, None], steered.to(x.dtype), x)


@dataclass(frozen=True)
class _SiteHook:
    """What happens at one site of one layer in each forward pass."""

    terms: Sequence[LayerDose]
    reading: PositionTracker

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        span, wide = self.reading.span, sites.widened(x)
        changes = torch.stack([term.changes(span, wide) for term in self.terms]).sum(0)
        acts = torch.stack([term.acts(span) for term in self.terms])
        turns = acts & torch.tensor([[term.rotates] for term in self.terms])
        return steer_tokens(x, changes, acts.any(0).to(x.device), turns.any(0).to(x.device))


def _layer_doses(
    doses: Sequence[tuple[Dose, LayerSteer]], num_layers: int
) -> dict[tuple[str, int], list[LayerDose]]:
    """The terms of each site and layer, in the layers that each dose acts in."""
    terms: dict[tuple[str, int], list[LayerDose]] = {}
    for dose, steer in doses:
        layers = steer.layers if dose.layers is None else dose.layers
        sites.check_layers_exist(layers, num_layers)
        for layer in layers:
            terms.setdefault((steer.site, layer), []).append(_layer_dose(dose, steer, layer))
    return terms


def _layer_dose(dose: Dose, steer: LayerSteer, layer: int) -> LayerDose:
    position = steer.layers.index(layer)
    if isinstance(steer, DeltaSteer):
        return LayerDose(dose, steer.delta[:, position], steer.steps, rotates=False)
    row = steer.vectors[position].double()
    if steer.mode == "rotate":
        return LayerDose(dose, (row / row.norm())[None], None, rotates=True)
    return LayerDose(dose, row[None], None, rotates=False)


def _check_width(term: LayerDose, width: int, site: str) -> None:
    steer_width = term.rows.shape[1]
    if steer_width != width:
        raise SteerError(
            f"steer {term.dose.steer} is {steer_width} wide; the site {site} of this model is "
            f"{width}"
        )
