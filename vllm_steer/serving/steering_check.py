"""Checks at start-up that a steer acts in every layer, by dummy runs through the steered path.

Each place, one site in one layer, has a request of its own with a dose in this layer only, at a
strength that about doubles the place's tensor. What the place's tensor is then must be

    add:     h + v * w
    rotate:  (h + v * w/|w|) * |h| / |h + v * w/|w||

for ``h`` the same tensor in an unsteered row of the same run.
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

    def steered(self, h: torch.Tensor, strength: float) -> torch.Tensor:
        """The tensor ``h`` under the steer, in float64."""
        moved = h + strength * self.vector
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
        strengths = [_strength(rows, one.vector) for one, rows in zip(part, unsteered, strict=True)]
        _prepare(sites, part, strengths, device)
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


def _strength(rows: tuple[torch.Tensor, torch.Tensor] | None, vector: torch.Tensor) -> float:
    """The strength that doubles a place's tensor; 0 for a place that is not reached or a vector
    of zeros.
    """
    norm = float(vector.norm())
    return 0.0 if rows is None or norm == 0.0 else _STRENGTH * float(rows[0].norm()) / norm


def _prepare(
    sites: Sequence[SteeredSite],
    part: Sequence[_SteeredPlace],
    strengths: Sequence[float],
    device: torch.device,
) -> None:
    """A step of requests with one token each: row 0 unsteered, row i + 1 with place i's dose."""
    num_rows = len(part) + 1
    req_ids = [f"row-{row}" for row in range(num_rows)]
    requests = {
        req_id: SteeredRequest((Dose(one.steer, strength, layers=(one.layer,)),), prompt_len=1)
        for req_id, one, strength in zip(req_ids[1:], part, strengths, strict=True)
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
