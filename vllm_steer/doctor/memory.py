"""Device memory of steers, measured on the tables of the real banks, filled on the host.

Not included is the token map of each steered site, ``4 K (1 + L)`` bytes for each token of the
largest batch, for up to K steers per request and L steered layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vllm_steer import hf
from vllm_steer.bank import (
    DirectionRange,
    HeadBank,
    HeadTable,
    LayerBank,
    SiteTable,
    fill_head_bank,
    fill_layer_bank,
)
from vllm_steer.config import Limits, SteerConfig
from vllm_steer.doctor.architecture import Architecture
from vllm_steer.doctor.finding import Finding
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.kernels.lm_steer import Constant, Dense, LowRank, Slot
from vllm_steer.runtime.residency import room_bytes
from vllm_steer.runtime_config import Room
from vllm_steer.steers import ConditionSteer, DeltaSteer, LMSteer, Steer, VectorSteer

PART = "memory"
_STEPS: Final = 32
_RANK: Final = 1000
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of each steer and of each site; a site's zero direction belongs to no steer."""

    steers: Mapping[str, int]
    sites: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all tables."""
        return sum(self.sites.values())


def config_memory(
    architecture: Architecture, source: str | Path, dtype: torch.dtype
) -> Iterator[Finding]:
    """Findings on the memory of a config's steers, and on each steer that does not fit the model.

    Raises ``SteerError`` for a config or a steer file that cannot be read.
    """
    config = SteerConfig.load(source)
    steers = {
        name: load_steer(entry.path, **entry.overrides)
        for name, entry in sorted(config.steers.items())
    }
    mismatches = {
        name: reason for name, s in steers.items() if (reason := mismatch(architecture, s))
    }
    fitting = {name: steer for name, steer in steers.items() if name not in mismatches}
    use = memory_use(fitting, hidden_size=architecture.hidden_size, dtype=dtype)
    for name, steer in steers.items():
        if name in mismatches:
            yield Finding(PART, name, "FAILED", mismatches[name])
        else:
            size = use.steers[name]
            message = f"{_size(size)}, {steer.kind} at {steer.site}"
            yield Finding(PART, name, "ok", message, {"bytes": size})
    yield from _sums(use, config.limits)
    if config.runtime.enabled:
        yield _reserved(architecture, config.runtime.room, dtype)


def example_memory(architecture: Architecture, dtype: torch.dtype) -> Iterator[Finding]:
    """Findings on the memory of one steer of each kind on this model."""
    for name, steer in _examples(architecture):
        size = memory_use({name: steer}, hidden_size=architecture.hidden_size, dtype=dtype).steers[
            name
        ]
        yield Finding(PART, name, "-", _size(size), {"bytes": size})


def memory_use(steers: Mapping[str, Steer], *, hidden_size: int, dtype: torch.dtype) -> MemoryUse:
    """Memory of steers for a model of ``hidden_size`` that runs in ``dtype``."""
    heads = {name: steer for name, steer in steers.items() if isinstance(steer, LMSteer)}
    inside = {name: s for name, s in steers.items() if not isinstance(s, LMSteer | ConditionSteer)}
    head = fill_head_bank(heads, dtype=dtype, device=_CPU)
    layers = fill_layer_bank(
        inside,
        layers=sorted({layer for steer in inside.values() for layer in steer.layers}),
        device=_CPU,
        # Only the shape of the attention's output projection matters here.
        project=lambda _layer, rows: rows.new_zeros(rows.shape[0], hidden_size),
    )
    return MemoryUse(
        steers={**_of_head(head), **_of_layers(layers)},
        sites={
            **({"head": head.num_bytes} if heads else {}),
            **{table.site: _table_bytes(table) for table in layers.tables},
        },
    )


def _of_head(bank: HeadBank) -> dict[str, int]:
    return {
        name: _slot_width(table.weights.slots[slot], width) * width * table.weights.shrink.itemsize
        for table in (bank.hidden, bank.logits)
        if table is not None
        for width in (_width(table),)
        for name, slot in table.slots.items()
    }


def _width(table: HeadTable) -> int:
    return table.weights.vectors.shape[1]


def _slot_width(slot: Slot, width: int) -> int:
    """Rows of ``width`` numbers that a steer occupies in its tables."""
    match slot:
        case LowRank():
            return 2 * (slot.end - slot.start)
        case Dense():
            return width * (1 if slot.fixed is None else 2)
        case Constant():
            return 1 if slot.fixed is None else 2


def _of_layers(bank: LayerBank) -> dict[str, int]:
    return {
        name: _steer_bytes(table, name, entry)
        for table in bank.tables
        for name, entry in table.entries.items()
    }


def _steer_bytes(table: SiteTable, name: str, entry: DirectionRange) -> int:
    """Bytes of a steer's directions, of its reader and of its low-rank map."""
    directions, row = table.directions, table.directions.vectors[:, 0].nbytes
    is_rotation = directions.is_rotation
    mark = 0 if is_rotation is None else is_rotation.itemsize
    total = (entry.steps or 1) * (row + mark)
    readings = directions.readings
    if readings is not None and int(readings.reader_of[entry.start]) >= 0:
        total += row
    if table.maps is not None and name in table.maps.slots:
        weights = table.maps.weights[0]
        rows = _slot_width(weights.slots[table.maps.slots[name]], weights.width)
        total += len(table.layers) * rows * weights.width * weights.shrink.itemsize
    return total


def _table_bytes(table: SiteTable) -> int:
    is_rotation = table.directions.is_rotation
    return table.num_bytes + (0 if is_rotation is None else is_rotation.nbytes)


def mismatch(architecture: Architecture, steer: Steer) -> str:
    """The reason why a steer does not fit a model; empty if it fits."""
    try:
        with hf.steered(architecture.model, *_use_of(steer)):
            return ""
    except SteerError as error:
        return str(error)


def _use_of(steer: Steer) -> tuple[dict[str, Any], dict[str, Steer]]:
    """Doses and steers that use a steer; a condition decides about a trial steer at the head."""
    if not isinstance(steer, ConditionSteer):
        return {"steer": 1.0}, {"steer": steer}
    size = steer.hidden_size
    trial = LMSteer(variant="add", add=torch.zeros(1, size), epsilon=1.0, hidden_size=size)
    return {"trial": {"when": "condition"}}, {"trial": trial, "condition": steer}


def _sums(use: MemoryUse, limits: Limits) -> Iterator[Finding]:
    by_site = ", ".join(f"{site} {_size(size)}" for site, size in use.sites.items())
    figures = {"bytes": use.total, "sites": dict(use.sites), "limits": limits.model_dump()}
    message = f"{_size(use.total)} on each rank, {len(use.steers)} steers: {by_site or 'none'}"
    yield Finding(PART, "all steers", "-", message, figures)
    bounds = ", ".join(f"{name} {bound}" for name, bound in limits.model_dump().items())
    yield Finding(PART, "limits", "-", bounds)


def _reserved(architecture: Architecture, room: Room, dtype: torch.dtype) -> Finding:
    """What is reserved for steers that are loaded while the engine serves."""
    sizes = room_bytes(
        room,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        num_layers=architecture.num_layers,
        itemsize=dtype.itemsize,
    )
    parts = ", ".join(f"{region} {_size(size)}" for region, size in sizes.items())
    message = f"{_size(sum(sizes.values()))} on each rank: {parts}"
    return Finding(PART, "room for loading", "-", message, {"bytes": sum(sizes.values()), **sizes})


def _examples(architecture: Architecture) -> Iterator[tuple[str, Steer]]:
    width, layers = architecture.hidden_size, tuple(range(architecture.num_layers))
    projector = torch.zeros(1, width, _RANK)
    yield (
        f"one LM-Steer of rank {_RANK}",
        LMSteer(
            variant="multiply",
            projector1=projector,
            projector2=projector,
            epsilon=1.0,
            hidden_size=width,
        ),
    )
    if "resid" in architecture.widths:
        vectors = torch.zeros(len(layers), width)
        yield "one vector in all layers", VectorSteer(vectors=vectors, layers=layers)
    if "heads" in architecture.widths:
        delta = torch.zeros(_STEPS, len(layers), architecture.widths["heads"])
        yield f"one delta of {_STEPS} steps", DeltaSteer(delta=delta, layers=layers)


def _size(num_bytes: int) -> str:
    """A number of bytes with its unit; whole numbers below one KiB."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
