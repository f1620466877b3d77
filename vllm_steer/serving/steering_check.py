"""Checks at start-up that a steer acts in every layer, by dummy runs through the steered path.

Each place, one site in one layer, has a request of its own with a dose in this layer only, at a
strength that about doubles the place's tensor. What the place's tensor is then must be

    add:     h + v * w
    rotate:  (h + v * w/|w|) * |h| / |h + v * w/|w||

for ``h`` the same tensor in an unsteered row of the same run. What else a strength is multiplied by
(``kernels.guidance.Readings``) is computed for this ``h``, with the norm of ``h`` as both bounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from vllm_steer.compat.patching import version_advice
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.kernels.lm_steer import LowRank
from vllm_steer.selftest.changes import Place, place_rows
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import SteeredRequest, Step

_STRENGTH: Final = 2.0
"""Of what is added, in norms of the tensor."""
_TOLERANCE: Final = 0.1
"""Of the difference from the formula, in norms of the change."""
_PLACES_PER_RUN: Final = 64


@dataclass(frozen=True)
class _SteeredPlace:
    """One layer of a site's table, with a steer that acts there."""

    site: SteeredSite
    index: int
    place: Place
    steer: str
    direction: int
    step: int

    @property
    def layer(self) -> int:
        return self.site.table.layers[self.index]

    @property
    def vector(self) -> torch.Tensor:
        return self.site.table.directions.vectors[self.index, self.direction].double().cpu()

    @property
    def rotates(self) -> bool:
        rotations = self.site.table.directions.is_rotation
        return rotations is not None and bool(rotations[self.direction])

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """What the steer adds to ``h`` at strength 1, in float64."""
        change = self.factor(h) * self.vector
        maps = self.site.table.maps
        if maps is None or self.steer not in maps.slots:
            return change
        weights = maps.weights[self.index]
        slot = weights.slots[maps.slots[self.steer]]
        assert isinstance(slot, LowRank)
        shrink, expand = (
            factor[slot.start : slot.end].double().cpu()
            for factor in (weights.shrink, weights.expand)
        )
        return change + (shrink @ h) @ expand

    def factor(self, h: torch.Tensor) -> float:
        """What the strength is multiplied by, with the norm of ``h`` as bounds."""
        readings = self.site.table.directions.readings
        if readings is None:
            return 1.0
        reader, activation = int(readings.reader_of[self.direction]), 0.0
        if reader >= 0:
            row = readings.vectors[self.index, reader].double().cpu()
            a = float(h @ row) + float(readings.bias[self.index, reader])
            activation = a if a > float(readings.threshold[self.index, reader]) else 0.0
        norm = float(h.norm())
        gains = readings.gains[self.direction].tolist()
        terms = (1.0, norm, norm, activation)
        return float(sum(gain * term for gain, term in zip(gains, terms, strict=True)))

    def steered(self, h: torch.Tensor, strength: float) -> torch.Tensor:
        """The tensor ``h`` under the steer, in float64."""
        moved = h + strength * self.change(h)
        return moved * (h.norm() / moved.norm()) if self.rotates else moved


def check_steering(
    sites: Sequence[SteeredSite],
    place_of: Callable[[SteeredSite, int], Place],
    first_layer: nn.Module,
    width: int,
    run: Callable[[int], Any],
    *,
    max_rows: int,
    attention_layers: Sequence[nn.Module],
    device: torch.device,
) -> None:
    """Raise ``SteerError`` for a layer where a steer does not change the model as it should.

    ``place_of(site, index)`` is where the ``index``-th layer of a site's table is steered; ``run``
    is an eager dummy run. A layer whose directions are all zero on this rank has a row too, so that
    all ranks make the same runs, but is not compared.
    """
    steered = [
        _place(site, index, place_of) for site in sites for index in range(len(site.table.layers))
    ]
    per_run = max(1, min(_PLACES_PER_RUN, max_rows - 1))
    for start in range(0, len(steered), per_run):
        part = steered[start : start + per_run]
        places = [one.place for one in part]
        unsteered = place_rows(places, first_layer, width, run, attention_layers)
        strengths = [_strength(rows, one) for one, rows in zip(part, unsteered, strict=True)]
        bounds = [0.0 if rows is None else float(rows[0].norm()) for rows in unsteered]
        _prepare(sites, part, strengths, bounds, device)
        try:
            measured = place_rows(places, first_layer, width, run, attention_layers)
        finally:
            for site in sites:
                site.disable()
                site.invalidate()
                site.reached.clear()  # what the compiled model reaches is still to be seen
        for one, strength, rows in zip(part, strengths, measured, strict=True):
            if rows is not None and strength:  # the check after warm-up names what is not reached
                _compare(one, *rows, one.steered(rows[0], strength))


def _place(
    site: SteeredSite, index: int, place_of: Callable[[SteeredSite, int], Place]
) -> _SteeredPlace:
    """The steer with the largest direction in this layer."""
    norms = site.table.directions.vectors[index].norm(dim=-1).tolist()
    layer = site.table.layers[index]
    largest: tuple[float, str, int, int] = (-1.0, "", 0, 0)
    for name, entry in site.table.entries.items():
        if layer in entry.layers:
            own = norms[entry.start : entry.start + (entry.steps or 1)]
            step = own.index(max(own))
            largest = max(largest, (own[step], name, entry.start + step, step))
    _, name, direction, step = largest
    return _SteeredPlace(site, index, place_of(site, index), name, direction, step)


def _strength(rows: tuple[torch.Tensor, torch.Tensor] | None, one: _SteeredPlace) -> float:
    """The strength that doubles a place's tensor; 0 for a place that is not reached and for a
    direction that adds nothing to this tensor.
    """
    if rows is None:
        return 0.0
    change = float(one.change(rows[0]).norm())
    return 0.0 if change == 0.0 else _STRENGTH * float(rows[0].norm()) / change


def _prepare(
    sites: Sequence[SteeredSite],
    part: Sequence[_SteeredPlace],
    strengths: Sequence[float],
    bounds: Sequence[float],
    device: torch.device,
) -> None:
    """A step of requests with one token each: row 0 unsteered, row i + 1 with place i's dose."""
    num_rows = len(part) + 1
    req_ids = [f"row-{row}" for row in range(num_rows)]
    requests = {
        req_id: SteeredRequest(
            (Dose(one.steer, strength, layers=(one.layer,), low=bound, high=bound),), prompt_len=1
        )
        for req_id, one, strength, bound in zip(req_ids[1:], part, strengths, bounds, strict=True)
    }
    ones = np.ones(num_rows, dtype=np.int64)
    step = Step(
        req_ids,
        ones,
        ones,
        torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        torch.tensor([0, *(one.step for one in part)], dtype=torch.int64, device=device),
    )
    for site in sites:
        site.begin_step()
        site.prepare(step, requests, torch.zeros(1, device=device))


def _compare(
    one: _SteeredPlace, base: torch.Tensor, own: torch.Tensor, expected: torch.Tensor
) -> None:
    change = (expected - base).norm()
    if not (own - expected).norm() <= _TOLERANCE * change:  # NaN too
        share = float((own - base) @ (expected - base) / change**2)
        raise SteerError(
            f"steer {one.steer}: at {one.site.table.site} of layer {one.layer} the forward pass "
            f"has {round(share, 2):g} of the change that it should have; {version_advice()}"
        )
