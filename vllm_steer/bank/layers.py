"""Device tables of the steers inside the layers: per site, directions for each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Final, NamedTuple

import torch

from vllm_steer.bank.low_rank import Factors, LowRankTable, MapRoom, factors_of, fill_low_rank
from vllm_steer.bank.readings import (
    FeatureReader,
    ReadingsBuilder,
    feature_reader,
    reads,
    rows_of,
    write_reading,
)
from vllm_steer.errors import SteerError
from vllm_steer.kernels.guidance import Directions
from vllm_steer.steers import DeltaSteer, LowRankSteer, SAESteer, VectorSteer
from vllm_steer.steers.sites import LAYER_SITES

GuidanceSteer = VectorSteer | DeltaSteer | SAESteer | LowRankSteer
"""A steer inside the layers."""
_READING_MODES: Final = frozenset({"project", "relative", "clamp", "scale"})
Project = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and tensors at the input of its attention's projection to those at its output."""


@dataclass(frozen=True)
class DirectionRange:
    """The directions of a steer: the first one, its steps (None for a vector), its layers."""

    start: int
    steps: int | None
    layers: tuple[int, ...]


class SiteRoom(NamedTuple):
    """Room at one site for steers that are loaded later: the ``layers`` of this rank that have it,
    and how many ``vectors``, ``steps`` of deltas, low-rank ``maps`` and ``conditions``.
    """

    layers: tuple[int, ...]
    vectors: int = 0
    steps: int = 0
    maps: int = 0
    conditions: int = 0

    @property
    def directions(self) -> int:
        """The directions that vectors, steps and maps take."""
        return self.vectors + self.steps + self.maps


@dataclass(frozen=True)
class LayerRoom:
    """Room for steers that are loaded later, by site.

    ``modes`` are those that vectors and features of autoencoders may have; ``max_map_rank`` bounds
    the rank of a low-rank map.
    """

    sites: Mapping[str, SiteRoom]
    width: int
    modes: frozenset[str]
    max_map_rank: int = 1


@dataclass(frozen=True)
class LayerTensors:
    """What a steer's reserved place is filled with, for L layers, in host memory.

    directions  ``[L, n, width]`` float32
    reader      of a feature of an autoencoder, else None
    factors     of a low-rank map, else None
    """

    directions: torch.Tensor
    reader: FeatureReader | None = None
    factors: Factors | None = None

    def pinned(self, is_pinned: bool) -> "LayerTensors":
        """The same in pinned memory, from which a GPU copies beside other work."""
        if not is_pinned:
            return self
        reader, factors = self.reader, self.factors
        if reader is not None:
            parts = (getattr(reader, part.name).pin_memory() for part in fields(reader))
            reader = FeatureReader(*parts)
        if factors is not None:
            factors = Factors(*(factor.pin_memory() for factor in factors))
        return LayerTensors(self.directions.pin_memory(), reader, factors)


@dataclass(frozen=True)
class SiteTable:
    """The steers of one site in the ``layers`` of one rank, those that some steer touches.

    Directions from ``first_vector`` on are reserved for vectors and features, from ``first_step``
    on for the steps of deltas, from ``first_map`` on for low-rank maps; ``fill`` writes them.
    ``directions`` keep their addresses.
    """

    site: str
    layers: tuple[int, ...]
    entries: dict[str, DirectionRange]
    directions: Directions
    first_vector: int = 0
    first_step: int = 0
    first_map: int = 0
    maps: LowRankTable | None = None

    @property
    def num_bytes(self) -> int:
        """Device memory of the table."""
        return self.directions.num_bytes + (0 if self.maps is None else self.maps.num_bytes)

    @property
    def needs_stream(self) -> bool:
        """Whether a change depends on the token, so that both halves of a stream are needed."""
        return self.directions.needs_stream or self.maps is not None

    def tensors_of(self, steer: GuidanceSteer) -> LayerTensors:
        """What the place of a steer that is loaded later is filled with."""
        directions = layer_rows(steer, self.layers)
        if isinstance(steer, SAESteer):
            return LayerTensors(directions, reader=feature_reader(steer, self.layers))
        if isinstance(steer, LowRankSteer):
            assert self.maps is not None
            factors = factors_of(steer, self.layers, self.maps.reserved_ranks)
            return LayerTensors(directions, factors=factors)
        return LayerTensors(directions)

    def fill(self, name: str, steer: GuidanceSteer, index: int, tensors: LayerTensors) -> None:
        """Put a steer where no running step uses any: at the vector or map of number ``index``, or
        from step ``index`` on.
        """
        rows = tensors.directions
        match steer:
            case DeltaSteer():
                start = self.first_step + index
            case LowRankSteer():
                start = self.first_map + index
            case _:
                start = self.first_vector + index
        end = start + rows.shape[1]
        self.directions.vectors[:, start:end].copy_(rows, non_blocking=True)
        if self.directions.is_rotation is not None:
            rotates = isinstance(steer, VectorSteer) and steer.mode == "rotate"
            self.directions.is_rotation[start:end] = 1.0 if rotates else 0.0
        if self.directions.readings is not None:
            reader = rows if tensors.reader is None else tensors.reader
            write_reading(self.directions.readings, steer, start, end, index, reader)
        if tensors.factors is not None:
            assert self.maps is not None
            self.maps.fill(name, index, tensors.factors)
        steps = rows.shape[1] if isinstance(steer, DeltaSteer) else None
        self.entries[name] = DirectionRange(start, steps, steer.layers)

    def remove(self, name: str) -> None:
        """Forget a steer; its directions may be written again."""
        self.entries.pop(name, None)
        if self.maps is not None:
            self.maps.remove(name)

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
    reserved = SiteRoom(()) if room is None else room.sites.get(site, SiteRoom(()))
    touched = local_layers & {layer for s in steers.values() for layer in s.layers}
    layers = tuple(sorted(touched.union(reserved.layers if reserved.directions else ())))
    if not layers:
        return None
    entries, first_vector = _entries(steers)
    vectors, map_room, modes = None, None, frozenset[str]()
    first_step = first_vector + reserved.vectors
    first_map = first_step + reserved.steps
    num_directions = first_map + reserved.maps
    if room is not None and reserved.directions:
        vectors = torch.zeros(len(layers), num_directions, room.width, device=device)
        modes = room.modes if reserved.vectors else modes
        map_room = MapRoom(reserved.maps, room.max_map_rank, room.width, first_map)
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
    if modes & _READING_MODES or any(map(reads, steers.values())):
        num_reserved = reserved.vectors if modes & _READING_MODES - {"relative"} else 0
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
        room=map_room,
    )
    return SiteTable(site, layers, entries, directions, first_vector, first_step, first_map, maps)


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
