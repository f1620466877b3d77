"""The steers inside the decoder layers, and the conditions that are read there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.hf import equations, sites
from vllm_steer.hf.conditions import ConditionReader, Gates
from vllm_steer.hf.token_positions import PassPositions, PositionTracker, coefficients
from vllm_steer.steers import DeltaSteer, LowRankSteer, SAESteer, VectorSteer

LayerSteer = VectorSteer | DeltaSteer | LowRankSteer | SAESteer
Change = Callable[[torch.Tensor, PassPositions], torch.Tensor]
"""What a steer adds to ``x [batch, tokens, width]`` at strength 1, of the same shape or
``[tokens, width]``.
"""


@dataclass(frozen=True)
class LayerDose:
    """One dose in one layer, and its steer's change there."""

    dose: Dose
    change: Change
    width: int
    num_steps: int | None = None
    rotates: bool = False

    def strengths(self, span: PassPositions, num_rows: int, gates: Gates) -> torch.Tensor:
        """The strength on each token of each row, ``[batch, tokens]`` float64, 0 where the dose
        does not act.
        """
        a = coefficients(self.dose, span, self.num_steps).expand(num_rows, -1)
        # Before the prompt's last token no verdict is known, and none is needed.
        if self.dose.gate is None or not a.any():
            return a
        return a * gates.open_rows(self.dose.gate, num_rows)[:, None]


def hook_layers(
    model: nn.Module,
    doses: Sequence[tuple[Dose, LayerSteer]],
    gates: Gates,
    tracker: PositionTracker,
) -> Iterator[RemovableHandle]:
    """Steer the layers of ``model`` by every dose, and read the conditions of the gates there.

    Raises ``SteerError`` for a steer or a condition that does not fit the model.
    """
    names, layers = sites.family(model), sites.layers_of(model)
    for (site, layer), acts in _by_place(doses, gates, len(layers)).items():
        width = sites.site_width(model, layers[layer], names, site)
        for reader in acts.readers:
            _check_width(f"condition {reader.name}", reader.condition.hidden_size, width, site)
        for term in acts.terms:
            _check_width(f"steer {term.dose.steer}", term.width, width, site)
        yield sites.attach(layers[layer], names, site, _SiteHook(acts, gates, tracker))


def steer_tokens(
    x: torch.Tensor, changes: torch.Tensor, acting: torch.Tensor, turning: torch.Tensor
) -> torch.Tensor:
    """``x + changes``, at the norm of ``x`` where a token is ``turning``, rounded once.

    Shapes: ``x [..., tokens, width]``, ``changes`` of the same shape or ``[tokens, width]``, in the
    dtype of the sums, ``acting`` and ``turning`` ``[..., tokens]`` bool. A token that is not
    ``acting`` keeps every bit.
    """
    wide = sites.widened(x)
    steered = wide + changes
    norm = steered.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    turned = steered / norm * wide.norm(dim=-1, keepdim=True)
    steered = torch.where(turning[..., None], turned, steered)
    return torch.where(acting[..., None], steered.to(x.dtype), x)


def change_at(steer: LayerSteer, layer: int, *, low: float | None, high: float | None) -> Change:
    """What a steer adds in one of its layers at strength 1; bounds that are None are its own."""
    row = steer.layers.index(layer)
    match steer:
        case DeltaSteer():
            return partial(_step_rows, rows=steer.delta[:, row])
        case VectorSteer():
            return _vector_change(steer, row, _bounds(steer, low, high))
        case LowRankSteer():
            bias = None if steer.bias is None else steer.bias[row]
            return _applied(equations.low_rank, steer.a[row], steer.b[row], bias)
        case SAESteer():
            return partial(_feature_change, steer=steer, row=row, bounds=_bounds(steer, low, high))


def _step_rows(x: torch.Tensor, span: PassPositions, *, rows: torch.Tensor) -> torch.Tensor:
    """The delta's row of each token's generation step, ``[tokens, width]``."""
    return rows[span.steps.clamp(0, len(rows) - 1)].to(x)


def _vector_change(steer: VectorSteer, row: int, bounds: tuple[float, float]) -> Change:
    w = steer.vectors[row].double()
    if steer.mode == "add":
        return _applied(equations.added, w)
    u = w / w.norm()
    match steer.mode:
        case "rotate":
            return _applied(equations.added, u)
        case "project":
            return _applied(equations.projected, u, *bounds)
        case "relative":
            return _applied(equations.relative, u)


def _feature_change(
    x: torch.Tensor,
    span: PassPositions,
    *,
    steer: SAESteer,
    row: int,
    bounds: tuple[float, float],
) -> torch.Tensor:
    d = steer.decoder[row].to(x)
    if steer.mode == "add":
        return equations.added(x, d)
    e, bias, threshold = (t[row].to(x) for t in (steer.encoder, steer.bias, steer.threshold))
    f = equations.feature(x, e, bias, threshold)
    if steer.mode == "scale":
        return equations.scaled(f, d)
    return equations.clamped(f, d, *bounds)


def _applied(equation: Callable[..., torch.Tensor], *operands: Any) -> Change:
    """An equation with its operands, of which tensors get ``x``'s dtype and device."""

    def change(x: torch.Tensor, _: PassPositions) -> torch.Tensor:
        return equation(x, *(o.to(x) if isinstance(o, torch.Tensor) else o for o in operands))

    return change


def _bounds(
    steer: VectorSteer | SAESteer, low: float | None, high: float | None
) -> tuple[float, float]:
    return (steer.low if low is None else low, steer.high if high is None else high)


@dataclass(frozen=True)
class _SiteActs:
    """What is read and what is changed at one site of one layer."""

    readers: list[ConditionReader] = field(default_factory=list)
    terms: list[LayerDose] = field(default_factory=list)


@dataclass(frozen=True)
class _SiteHook:
    """What happens at one site of one layer in each forward pass: conditions are read first."""

    acts: _SiteActs
    gates: Gates
    tracker: PositionTracker

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for reader in self.acts.readers:
            reader.read(x)
        if not self.acts.terms:
            return x
        span, wide = self.tracker.span, sites.widened(x)
        changes = torch.zeros_like(wide)
        acting = torch.zeros(x.shape[:-1], dtype=torch.bool)
        turning = torch.zeros_like(acting)
        for term in self.acts.terms:
            a = term.strengths(span, len(x), self.gates)
            # Not 0 times a change, which may be infinite where the dose does not act.
            change = a[..., None].to(wide) * term.change(wide, span)
            changes += torch.where((a != 0)[..., None].to(x.device), change, 0.0)
            acting |= a != 0
            turning |= (a != 0) & term.rotates
        return steer_tokens(x, changes, acting.to(x.device), turning.to(x.device))


def _by_place(
    doses: Sequence[tuple[Dose, LayerSteer]], gates: Gates, num_layers: int
) -> dict[tuple[str, int], _SiteActs]:
    """What happens at each site and layer, in the layers that each dose acts in."""
    places: dict[tuple[str, int], _SiteActs] = {}
    for reader in gates.readers.values():
        (layer,) = reader.condition.layers
        sites.check_layers_exist((layer,), num_layers)
        places.setdefault((reader.condition.site, layer), _SiteActs()).readers.append(reader)
    for dose, steer in doses:
        layers = steer.layers if dose.layers is None else dose.layers
        sites.check_layers_exist(layers, num_layers)
        for layer in layers:
            place = places.setdefault((steer.site, layer), _SiteActs())
            place.terms.append(_layer_dose(dose, steer, layer))
    return places


def _layer_dose(dose: Dose, steer: LayerSteer, layer: int) -> LayerDose:
    return LayerDose(
        dose,
        change_at(steer, layer, low=dose.low, high=dose.high),
        width=steer.hidden_size,
        num_steps=steer.steps,
        rotates=getattr(steer, "mode", None) == "rotate",
    )


def _check_width(name: str, width: int, expected: int, site: str) -> None:
    if width != expected:
        raise SteerError(f"{name} is {width} wide; the site {site} of this model is {expected}")
