"""A worker's reserved device memory, and the steers that are loaded into it at run time.

A thread reads and converts a steer's file while the worker goes on with its steps; what is left
for the time between two steps is one copy to the device. The place was free, so that no running
request reads from it, and the copy is ordered before the steps after it. The answers are plain data
that travel to the engine core: an error of one rank must not end the engine.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from vllm_steer.bank import ConditionTable, HeadBank, HeadTable, LayerTensors, SiteTable
from vllm_steer.bank.conditions import unit_vector
from vllm_steer.bank.head import SlotTensors, check_range, slot_tensors
from vllm_steer.bank.layers import GuidanceSteer, check_projected
from vllm_steer.errors import SteerError, cause
from vllm_steer.files import load_steer, save_steer
from vllm_steer.loaded_steers import LoadedSteers
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.background import background_thread, rest
from vllm_steer.serving.layers import SteeredLayers
from vllm_steer.serving.model_sites import ModelSites
from vllm_steer.steers import ConditionSteer, LMSteer, Steer
from vllm_steer.steers.content import content_digest

logger = logging.getLogger("vllm.vllm_steer")

Reply = dict[str, Any]
"""``{"state": READY}``, ``{"state": READING}`` or ``{"error": message}``."""
READY: Final = "ready"
READING: Final = "reading"
LOADING: Final = ("steer_read", "steer_ready", "steer_write", "steer_forget")
"""The methods of a worker that an engine core calls."""


@dataclass
class _Reading:
    """A steer that a thread reads: ``steer`` and ``tensors`` once it has, or the ``error``."""

    planned: PlannedSteer
    start: int
    name: str
    done: "Future[None]" = field(default_factory=Future)
    steer: Steer | None = None
    tensors: SlotTensors | LayerTensors | torch.Tensor | None = None
    error: str = ""


@dataclass
class ReservedBank:
    """What one worker has of the reserved memory: the head's table, those of its layers."""

    loaded: LoadedSteers
    head: HeadBank | None
    layers: SteeredLayers | None
    sites: ModelSites | None
    dtype: torch.dtype
    on_cuda: bool = False
    _reading: dict[str, _Reading] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(
        default_factory=lambda: background_thread(low_priority=False)
    )

    def warm_up(self) -> None:
        """Read a small steer, so that the first load imports nothing and starts no threads."""

        def read_once() -> None:
            steer = LMSteer(variant="add", add=torch.ones(1, 8), epsilon=1.0, hidden_size=8)
            with tempfile.TemporaryDirectory() as folder:
                save_steer(steer, path := Path(folder) / "steer.safetensors")
                content_digest(load_steer(path))
            slot_tensors(steer, self.dtype)

        self._reader.submit(read_once).result()

    def call(
        self,
        method: str,
        args: Sequence[Any],
        projection: Callable[[], Callable[[int, torch.Tensor], torch.Tensor]],
    ) -> Reply:
        """Carry out one of ``LOADING``; whatever goes wrong is in the reply."""
        try:
            if method == "steer_read":
                return self.read(*args)
            if method == "steer_ready":
                return self.ready(*args)
            if method == "steer_write":
                return self.write(args[0], projection)
            return self.forget(*args)
        except SteerError as error:
            return {"error": str(error)}
        except Exception as error:
            logger.exception("vllm-steer: %s failed", method)
            return {"error": f"{type(error).__name__}: {cause(error)}"}

    def read(self, data: Mapping[str, Any], name: str, start: int) -> Reply:
        """Begin to read a steer that is to be placed at ``start``."""
        planned = PlannedSteer.model_validate(data)
        assert planned.key is not None
        layers = None if planned.layers is None else self._check_layers(name, planned)
        reading = _Reading(planned, start, name)
        reading.done = self._reader.submit(self._read, reading, layers)
        self._reading[planned.key] = reading
        return {"state": READING}

    def ready(self, key: str) -> Reply:
        """Whether a steer has been read and can be written."""
        reading = self._reading.get(key)
        if reading is None:
            return {"state": READY} if key in self.loaded else {"error": "nothing was read"}
        if not reading.done.done():
            return {"state": READING}
        return {"error": reading.error} if reading.error else {"state": READY}

    def write(
        self,
        key: str,
        projection: Callable[[], Callable[[int, torch.Tensor], torch.Tensor]],
    ) -> Reply:
        """Write a steer to the device; in step with the other ranks, all of which are ready."""
        reply = self.ready(key)
        reading = self._reading.pop(key, None)
        if reply.get("state") != READY or reading is None:
            return reply
        self._write(key, reading, projection)
        self.loaded.add(reading.planned)
        return {"state": READY}

    def forget(self, keys: Sequence[str]) -> Reply:
        """Steers whose places are to be written by others, or that another rank could not load."""
        for key in keys:
            self._reading.pop(key, None)
            self.loaded.remove(key)
            for table in () if self.head is None else (self.head.hidden, self.head.logits):
                if table is not None:
                    table.remove(key)
            if self.layers is not None:
                self.layers.set_at_heads(key, None)
                for site in self.layers.sites:
                    site.table.remove(key)
                for condition_site in self.layers.condition_sites:
                    condition_site.table.remove(key)
        return {"state": READY}

    def _check_layers(self, name: str, planned: PlannedSteer) -> tuple[int, ...]:
        """The layers that a steer acts in; in step with the other pipeline stages."""
        assert planned.layers is not None and self.sites is not None
        layers = planned.layers
        if planned.where_present:
            layers = self.sites.present_layers(name, planned.site, layers)
        else:
            self.sites.check_layers(f"steer {name}", planned.site, layers)
        table = self._table_of(planned.kind, planned.site)
        local = set(layers) & set(self.sites.families)
        missing = sorted(local - set(() if table is None else table.layers))
        if missing:
            raise SteerError(
                f"steer {name}: runtime.room has no room in layers {missing}; add them to "
                "runtime.room.layers"
            )
        return layers

    def _table_of(self, kind: str, site: str) -> SiteTable | ConditionTable | None:
        """The table of steers of a kind inside the layers; None if this rank has none."""
        if self.layers is None:
            return None
        is_read = kind == ConditionSteer.kind
        return self.layers.conditions_of(site) if is_read else self.layers.table_of(site)

    def _read(self, reading: _Reading, layers: tuple[int, ...] | None) -> None:
        try:
            steer = reading.planned.load(verifies=False)  # the frontend has just written it
            rest()
            if isinstance(steer, LMSteer):
                if self.head is not None:
                    check_range(reading.name, steer, self.dtype)
                    rest()
                    reading.tensors = slot_tensors(steer, self.dtype).pinned(self.on_cuda)
            else:
                steer = steer if layers is None else steer.keep_layers(layers)
                table = self._table_of(steer.kind, steer.site)
                if isinstance(steer, ConditionSteer):
                    vector = unit_vector(steer)
                    reading.tensors = vector.pin_memory() if self.on_cuda else vector
                elif isinstance(table, SiteTable):
                    reading.tensors = table.tensors_of(steer).pinned(self.on_cuda)
            reading.steer = steer
        except SteerError as error:
            reading.error = str(error)
        except Exception as error:
            logger.exception("vllm-steer: reading steer %s failed", reading.name)
            reading.error = f"steer {reading.name}: {type(error).__name__}: {cause(error)}"

    def _write(
        self,
        key: str,
        reading: _Reading,
        projection: Callable[[], Callable[[int, torch.Tensor], torch.Tensor]],
    ) -> None:
        steer, tensors = reading.steer, reading.tensors
        if isinstance(steer, LMSteer):
            if self.head is not None and isinstance(tensors, SlotTensors):
                table = self.head.logits if steer.variant == "offset" else self.head.hidden
                assert isinstance(table, HeadTable)
                table.fill(key, reading.start, tensors)
            return
        if steer is None or self.layers is None:
            return
        table_of_layers = self._table_of(steer.kind, steer.site)
        if isinstance(steer, ConditionSteer):
            if isinstance(table_of_layers, ConditionTable) and isinstance(tensors, torch.Tensor):
                table_of_layers.fill(key, steer, reading.start, tensors)
            return
        if not isinstance(tensors, LayerTensors):
            return
        assert isinstance(table_of_layers, SiteTable)
        if steer.site == "heads":
            rows = tensors.directions
            rows = self._projected(reading.name, steer, rows, table_of_layers.layers, projection())
            tensors = LayerTensors(rows)
            self.layers.set_at_heads(key, steer)
        table_of_layers.fill(key, steer, reading.start, tensors)

    def _projected(
        self,
        name: str,
        steer: GuidanceSteer,
        rows: torch.Tensor,
        layers: Sequence[int],
        project: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The rows at the output of each layer's projection; in step with the other ranks."""
        assert self.layers is not None
        table = self.layers.table_of("heads")
        assert table is not None
        vectors = table.directions.vectors
        projected = vectors.new_zeros(len(layers), rows.shape[1], vectors.shape[2])
        for index, layer in enumerate(layers):
            if layer in steer.layers:
                projected[index] = project(layer, rows[index].to(vectors.device))
                check_projected(name, layer, projected[index])
        return projected
