"""Which steers are in the device memory that was reserved at start-up, and where.

A steer stays where it was placed as long as its name is loaded, a request uses it, or a lease on it
runs. After that its place is free: the steer is still there until another one needs the place, and
the one that was used least recently goes first.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.refusal import CONFLICT, Refused
from vllm_steer.runtime_config import Room
from vllm_steer.steers.sites import HEAD

LEASE_SECONDS: Final = 5.0
"""How long a steer stays for a request that is on its way, or until its name is written."""


@dataclass(frozen=True)
class Place:
    """Units ``start`` to ``start + length`` of a region: slots, vectors, steps or maps."""

    region: str
    start: int
    length: int


@dataclass
class _Resident:
    place: Place
    last_used: float
    leased_until: float = 0.0


@dataclass
class Residency:
    """The reserved memory of one engine. Times are seconds of one monotonic clock."""

    room: Room
    _residents: dict[str, _Resident] = field(default_factory=dict)

    def __contains__(self, key: object) -> bool:
        return key in self._residents

    def place_of(self, key: str) -> Place:
        """Where a resident steer is."""
        return self._residents[key].place

    def use(self, key: str, now: float) -> None:
        """A request uses a resident steer from now on; a lease on it has done its work."""
        resident = self._residents[key]
        resident.last_used, resident.leased_until = now, 0.0

    def lease(self, key: str, now: float) -> None:
        """Keep a resident steer for ``LEASE_SECONDS``."""
        resident = self._residents[key]
        resident.last_used, resident.leased_until = now, now + LEASE_SECONDS

    def add(
        self, key: str, steer: PlannedSteer, *, in_use: Collection[str], now: float
    ) -> list[str]:
        """Place a steer; the keys of those that had to go. ``in_use``: those that must stay.

        Raises ``Refused`` where there is no room, and nothing has changed then.
        """
        region, length = needed_room(steer)
        capacity = capacities(self.room).get(region, 0)
        if length > capacity:
            raise Refused(_no_region(region, length, self.room))
        leaving: list[str] = []
        while (start := self._free_start(region, length, capacity, leaving)) is None:
            free = [
                key
                for key, one in self._residents.items()
                if one.place.region == region
                and key not in leaving
                and key not in in_use
                and one.leased_until <= now
            ]
            if not free:
                raise Refused(_full(region, length, capacity), CONFLICT)
            leaving.append(min(free, key=lambda key: self._residents[key].last_used))
        for key_of_leaving in leaving:
            del self._residents[key_of_leaving]
        self._residents[key] = _Resident(Place(region, start, length), now)
        return leaving

    def remove(self, key: str) -> None:
        """Free a steer's place at once."""
        self._residents.pop(key, None)

    def used(self, in_use: Collection[str]) -> Mapping[str, tuple[int, int]]:
        """By region: the units of the steers ``in_use``, and all units."""
        used = dict.fromkeys(capacities(self.room), 0)
        for key in set(in_use) & set(self._residents):
            place = self._residents[key].place
            used[place.region] += place.length
        return {region: (used[region], total) for region, total in capacities(self.room).items()}

    def _free_start(
        self, region: str, length: int, capacity: int, leaving: Collection[str]
    ) -> int | None:
        """The first gap of ``length`` units; None if there is none."""
        start = 0
        for place in sorted(
            (one.place for key, one in self._residents.items() if key not in leaving),
            key=lambda place: place.start,
        ):
            if place.region != region:
                continue
            if place.start - start >= length:
                return start
            start = place.start + place.length
        return start if capacity - start >= length else None


def needed_room(steer: PlannedSteer) -> tuple[str, int]:
    """The region that a steer is placed in, and how many units it takes."""
    if steer.site == HEAD:
        return ("offsets" if steer.variant == "offset" else "lm_steers"), 1
    if steer.steps is not None:
        return f"delta_steps at {steer.site}", steer.steps
    units = {"low_rank": "low_rank_maps", "condition": "conditions"}.get(steer.kind, "vectors")
    return f"{units} at {steer.site}", 1


def capacities(room: Room) -> dict[str, int]:
    """The units of each region."""
    regions = {"lm_steers": room.lm_steers, "offsets": room.offsets}
    for site in room.layer_sites:
        if site != "heads":
            regions[f"vectors at {site}"] = room.vectors
            regions[f"low_rank_maps at {site}"] = room.low_rank_maps
            regions[f"conditions at {site}"] = room.conditions
        regions[f"delta_steps at {site}"] = room.delta_steps
    return {region: units for region, units in regions.items() if units}


def room_bytes(
    room: Room, *, hidden_size: int, vocab_size: int, num_layers: int, itemsize: int
) -> dict[str, int]:
    """Device bytes of each region on one rank, ``itemsize`` being that of the model's dtype."""
    direction = (num_layers if room.layers is None else len(room.layers)) * hidden_size * 4
    unit = {
        "lm_steers": (2 * room.max_rank + 2) * hidden_size * itemsize,
        "offsets": 2 * vocab_size * itemsize,
        "vectors": (2 if room.reads else 1) * direction,
        "delta_steps": direction,
        "low_rank_maps": (2 * room.max_map_rank + 1) * direction,
        "conditions": direction,
    }
    return {
        region: units * unit[region.partition(" at ")[0]]
        for region, units in capacities(room).items()
    }


def check_fits(name: str, steer: PlannedSteer, room: Room) -> None:
    """Raise ``Refused`` for a steer that the reserved room could not hold even if it were empty."""
    region, length = needed_room(steer)
    if length > capacities(room).get(region, 0):
        raise Refused(f"steer {name}: {_no_region(region, length, room)}")
    if steer.kind == "low_rank" and steer.rank > room.max_map_rank:
        raise Refused(
            f"steer {name}: its rank is {steer.rank}; runtime.room.max_map_rank is "
            f"{room.max_map_rank}"
        )
    if steer.kind == "lm_steer" and steer.rank > room.max_rank:
        raise Refused(
            f"steer {name}: its rank over all columns is {steer.rank}; runtime.room.max_rank is "
            f"{room.max_rank}"
        )
    if steer.mode is not None and steer.mode not in room.modes:
        raise Refused(
            f"steer {name}: its mode is {steer.mode}; runtime.room.modes has "
            f"{', '.join(room.modes)}"
        )


def _no_region(region: str, length: int, room: Room) -> str:
    having = ", ".join(f"{units} {region}" for region, units in capacities(room).items())
    needed = f"{length} {region}" if length > 1 else region
    return f"there is no room for {needed}; runtime.room has {having}"


def _full(region: str, length: int, capacity: int) -> str:
    free = f"{length} in a row" if length > 1 else "one"
    return (
        f"all of the room is in use: no {free} of the {capacity} {region} is free, which a "
        "replacement needs, too; unload a steer, wait for the requests that use one that was "
        "unloaded, or restart with more in runtime.room"
    )
