"""Device tables of the steers inside the layers: per site, directions for each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_steer.bank.low_rank import LowRankTable, fill_low_rank
from vllm_steer.bank.readings import ReadingsBuilder, reads, rows_of, write_reading
from vllm_steer.errors import SteerError
from vllm_steer.kernels.guidance import Directions
from vllm_steer.steers import DeltaSteer, LowRankSteer, SAESteer, VectorSteer
from vllm_steer.steers.sites import LAYER_SITES

GuidanceSteer = VectorSteer | DeltaSteer | SAESteer | LowRankSteer
"""A steer inside the layers."""
Project = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and tensors at the input of its attention's projection to those at its output."""


@dataclass(frozen=True)
class DirectionRange:
    """The directions of a steer: the first one, its steps (None for a vector), its layers."""

    start: int
    steps: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LayerRoom:
    """Reserved directions for steers that are loaded later, by site: those that vectors and the
    steps of deltas take; and the ``layers`` of this rank that have the site.

    ``modes`` are those that the vectors may have.
    """

    directions: Mapping[str, tuple[int, int]]
    layers: Mapping[str, tuple[int, ...]]
    width: int
    modes: frozenset[str]


@dataclass(frozen=True)
class SiteTable:
    """The steers of one site in the ``layers`` of one rank, those that some steer touches.

    Directions from ``first_vector`` on are reserved for vectors, from ``first_step`` on for the
    steps of deltas; ``fill`` writes them. ``directions`` keep their addresses.
    """

    site: str
    layers: tuple[int, ...]
    entries: dict[str, DirectionRange]
    directions: Directions
    first_vector: int = 0
    first_step: int = 0
    maps: LowRankTable | None = None

    @property
    def num_bytes(self) -> int:
        """Device memory of the table."""
        return self.directions.num_bytes + (0 if self.maps is None else self.maps.num_bytes)

    @property
    def needs_stream(self) -> bool:
        """Whether a change depends on the token, so that both halves of a stream are needed."""
        return self.directions.needs_stream or self.maps is not None

    def fill(self, name: str, steer: GuidanceSteer, index: int, rows: torch.Tensor) -> None:
        """Put a steer's directions ``rows [L, n, width]`` where no running step uses any: at vector
        number ``index``, or from step ``index`` on.
        """
        is_vector = not isinstance(steer, DeltaSteer)
        start = (self.first_vector if is_vector else self.first_step) + index
        end = start + rows.shape[1]
        self.directions.vectors[:, start:end].copy_(rows, non_blocking=True)
        if self.directions.is_rotation is not None:
            rotates = isinstance(steer, VectorSteer) and steer.mode == "rotate"
            self.directions.is_rotation[start:end] = 1.0 if rotates else 0.0
        if self.directions.readings is not None:
            write_reading(self.directions.readings, steer, start, end, index, rows)
        steps = None if is_vector else rows.shape[1]
        self.entries[name] = DirectionRange(start, steps, steer.layers)

    def remove(self, name: str) -> None:
        """Forget a steer; its directions may be written again."""
        self.entries.pop(name, None)

    @contextmanager
    def trial_steer(self) -> Iterator[None]:
        """A random vector in the first reserved direction, for the checks of start-up."""
        vectors, start = self.directions.vectors, self.first_vector
        if start == 0 or start == vectors.shape[1]:  # nothing is reserved
            yield
            return
        vector = torch.randn(vectors.shape[2], generator=torch.Generator().manual_seed(1))
        vectors[:, start] = vector.to(vectors.device)
        name = f"<reserved at {self.site}>"  # no steer can have it
        self.entries[name] = DirectionRange(start, None, self.layers)
        try:
            yield
        finally:
            vectors[:, start] = 0.0
            self.remove(name)


@dataclass(frozen=True)
class LayerBank:
    """A table per site with steers."""

    tables: tuple[SiteTable, ...]

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        return sum(table.num_bytes for table in self.tables)


def fill_layer_bank(
    steers: Mapping[str, GuidanceSteer],
    *,
    layers: Sequence[int],
    device: torch.device,
    project: Project,
    room: LayerRoom | None = None,
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
        if (table := _table(site, site_steers, set(layers), device, project, room))
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
            rows = project(layer, rows_of(steer, layer).to(vectors.device, torch.float32))
            check_projected(name, layer, rows)
            vectors[table.layers.index(layer), start : start + rows.shape[0]] = rows


def _table(
    site: str,
    steers: Mapping[str, GuidanceSteer],
    local_layers: set[int],
    device: torch.device,
    project: Project,
    room: LayerRoom | None,
) -> SiteTable | None:
    """One site's table; None if no steer of it touches a layer of this rank and none has room."""
    reserved = () if room is None else room.layers.get(site, ())
    touched = local_layers & {layer for s in steers.values() for layer in s.layers}
    layers = tuple(sorted(touched | set(reserved)))
    if not layers:
        return None
    entries, num_directions = _entries(steers)
    first_vector, vectors, modes = num_directions, None, frozenset[str]()
    first_step = first_vector
    if room is not None and reserved:
        num_vectors, num_steps = room.directions[site]
        first_step = first_vector + num_vectors
        num_directions = first_step + num_steps
        vectors = torch.zeros(len(layers), num_directions, room.width, device=device)
        modes = room.modes if num_vectors else modes
    for name, steer in steers.items():
        for layer in set(steer.layers) & set(layers):
            rows = rows_of(steer, layer).to(device, torch.float32)
            if site == "heads":
                rows = project(layer, rows)
                check_projected(name, layer, rows)
            if vectors is None:
                vectors = rows.new_zeros(len(layers), num_directions, rows.shape[1])
            start = entries[name].start
            vectors[layers.index(layer), start : start + rows.shape[0]] = rows
    assert vectors is not None
    is_rotation = _is_rotation(steers, entries, vectors, always="rotate" in modes)
    readings = None
    if modes & {"project", "relative"} or any(map(reads, steers.values())):
        num_reserved = first_step - first_vector if "project" in modes else 0
        builder = ReadingsBuilder(vectors, layers, num_reserved)
        for name, steer in steers.items():
            builder.add(steer, entries[name].start)
        readings = builder.build()
    directions = Directions(vectors, is_rotation, readings)
    low_rank = {name: steer for name, steer in steers.items() if isinstance(steer, LowRankSteer)}
    maps = fill_low_rank(
        low_rank,
        layers,
        {name: entries[name].start for name in low_rank},
        num_directions=vectors.shape[1],
        device=device,
    )
    return SiteTable(site, layers, entries, directions, first_vector, first_step, maps)


def check_projected(name: str, layer: int, rows: torch.Tensor) -> None:
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


def layer_rows(steer: GuidanceSteer, layers: Sequence[int]) -> torch.Tensor:
    """``[L, directions, width]`` float32: a steer's directions in ``layers``, else zeros."""
    count = steer.steps if isinstance(steer, DeltaSteer) else 1
    rows = torch.zeros(len(layers), count, steer.hidden_size)
    for index, layer in enumerate(layers):
        if layer in steer.layers:
            rows[index] = rows_of(steer, layer)
    return rows


def _is_rotation(
    steers: Mapping[str, GuidanceSteer],
    entries: Mapping[str, DirectionRange],
    vectors: torch.Tensor,
    *,
    always: bool = False,
) -> torch.Tensor | None:
    rotated = [
        entries[name].start
        for name, steer in steers.items()
        if isinstance(steer, VectorSteer) and steer.mode == "rotate"
    ]
    if not rotated and not always:
        return None
    is_rotation = vectors.new_zeros(vectors.shape[1])
    is_rotation[rotated] = 1.0
    return is_rotation
