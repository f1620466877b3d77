"""Device tables of vector and delta steers: per site, directions for each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_steer.errors import SteerError
from vllm_steer.kernels.guidance import Directions
from vllm_steer.steers import DeltaSteer, VectorSteer
from vllm_steer.steers.sites import LAYER_SITES

GuidanceSteer = VectorSteer | DeltaSteer
Project = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and tensors at the input of its attention's projection to those at its output."""


@dataclass(frozen=True)
class DirectionRange:
    """The directions of a steer: the first one, its steps (None for a vector), its layers."""

    start: int
    steps: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class SiteTable:
    """The steers of one site in the ``layers`` of one rank, those that some steer touches."""

    site: str
    layers: tuple[int, ...]
    entries: Mapping[str, DirectionRange]
    directions: Directions


@dataclass(frozen=True)
class LayerBank:
    """A table per site with steers."""

    tables: tuple[SiteTable, ...]

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        return sum(table.directions.num_bytes for table in self.tables)


def fill_layer_bank(
    steers: Mapping[str, GuidanceSteer],
    *,
    layers: Sequence[int],
    device: torch.device,
    project: Project,
) -> LayerBank:
    """Put the steers' directions for ``layers``, those of this rank, on the device.

    Directions at ``heads`` are projected through the layer's own projection once, here: the
    projection is linear, so adding ``W delta`` to its output is adding ``delta`` to its input.
    Raises ``SteerError`` for one whose projection is beyond the range of the model's dtype.
    """
    by_site = {
        site: {name: steer for name, steer in sorted(steers.items()) if steer.site == site}
        for site in LAYER_SITES
    }
    tables = [
        table
        for site, site_steers in by_site.items()
        if site_steers and (table := _table(site, site_steers, set(layers), device, project))
    ]
    return LayerBank(tuple(tables))


def project_again(table: SiteTable, steers: Mapping[str, GuidanceSteer], project: Project) -> None:
    """Write the directions of ``steers``, those at ``heads``, into their table again.

    For a model whose weights have changed; the buffers stay the same. Raises ``SteerError`` for one
    whose projection is beyond the range of the model's dtype.
    """
    vectors = table.directions.vectors
    for name, steer in steers.items():
        start = table.entries[name].start
        for layer in sorted(set(steer.layers) & set(table.layers)):
            rows = project(layer, _rows(steer, layer).to(vectors.device, torch.float32))
            _check_range(name, layer, rows)
            vectors[table.layers.index(layer), start : start + rows.shape[0]] = rows


def _table(
    site: str,
    steers: Mapping[str, GuidanceSteer],
    local_layers: set[int],
    device: torch.device,
    project: Project,
) -> SiteTable | None:
    """One site's table; None if no steer of it touches a layer of this rank."""
    layers = tuple(sorted(local_layers & {layer for s in steers.values() for layer in s.layers}))
    if not layers:
        return None
    entries, num_directions = _entries(steers)
    vectors = None
    for name, steer in steers.items():
        for layer in set(steer.layers) & set(layers):
            rows = _rows(steer, layer).to(device, torch.float32)
            if site == "heads":
                rows = project(layer, rows)
                _check_range(name, layer, rows)
            if vectors is None:
                vectors = rows.new_zeros(len(layers), num_directions, rows.shape[1])
            start = entries[name].start
            vectors[layers.index(layer), start : start + rows.shape[0]] = rows
    assert vectors is not None
    return SiteTable(
        site, layers, entries, Directions(vectors, _is_rotation(steers, entries, vectors))
    )


def _check_range(name: str, layer: int, rows: torch.Tensor) -> None:
    """Raise ``SteerError`` for non-finite values: 0 * inf is NaN, even for unsteered tokens."""
    if not torch.isfinite(rows).all():
        raise SteerError(
            f"steer {name} has values at the heads of layer {layer} beyond the range of the "
            "model's dtype; scale it down and its strengths up"
        )


def _entries(steers: Mapping[str, GuidanceSteer]) -> tuple[dict[str, DirectionRange], int]:
    """Each steer's place, and the number of directions; direction 0 is the zero vector."""
    entries, count = {}, 1
    for name, steer in steers.items():
        steps = steer.steps if isinstance(steer, DeltaSteer) else None
        entries[name] = DirectionRange(count, steps, steer.layers)
        count += 1 if steps is None else steps
    return entries, count


def _rows(steer: GuidanceSteer, layer: int) -> torch.Tensor:
    """``[directions, width]`` of one layer: a unit vector for ``rotate``."""
    index = steer.layers.index(layer)
    if isinstance(steer, DeltaSteer):
        return steer.delta[:, index].float()
    vector = steer.vectors[index].double()
    return (vector / vector.norm() if steer.mode == "rotate" else vector).float()[None]


def _is_rotation(
    steers: Mapping[str, GuidanceSteer],
    entries: Mapping[str, DirectionRange],
    vectors: torch.Tensor,
) -> torch.Tensor | None:
    rotated = [
        entries[name].start
        for name, steer in steers.items()
        if isinstance(steer, VectorSteer) and steer.mode == "rotate"
    ]
    if not rotated:
        return None
    is_rotation = vectors.new_zeros(vectors.shape[1])
    is_rotation[rotated] = 1.0
    return is_rotation
