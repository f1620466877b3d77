"""What must hold when all clients have gone: nothing leaked, memory flat."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import aiohttp

from benchmarks.soak.changes import HEADERS, NAMES, NO_ROOM, post
from benchmarks.soak.contents import DELTA_STEPS, ROOM, Content

IDLE_WITHIN_S: Final = 30.0
LEASES_WITHIN_S: Final = 12.0
WORKERS: Final = "VLLM::Worker"
GROWTH: Final = 0.03
GROWTH_OF_WORKERS: Final = 0.10
GROWTH_MIB: Final = 12.0
"""What the mean of the last fifth may be above that of the second: a share of it, and MiB. A worker
on a CPU grows by more at first, as much without a steer.
"""
LATE_GROWTH: Final = 0.015
"""The same share for the last fifth above the fourth: by then a worker grows no more."""
PLACES: Final = {
    "lm_steers": ROOM["lm_steers"],
    "vectors": ROOM["vectors"],
    "delta_steps": ROOM["delta_steps"] // DELTA_STEPS,
    "low_rank_maps": ROOM["low_rank_maps"],
}
_IDLE: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """The sums of all samples of each metric."""
    sums: defaultdict[str, float] = defaultdict(float)
    async with session.get("/metrics") as reply:
        for line in (await reply.text()).splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                sums[name.partition("{")[0]] += float(value)
    return dict(sums)


async def wait_until_idle(session: aiohttp.ClientSession) -> dict[str, float]:
    """The idle metrics once they are 0, or after ``IDLE_WITHIN_S``."""
    deadline = time.monotonic() + IDLE_WITHIN_S
    while True:
        async with session.get("/health"):
            pass
        now = await metrics(session)
        idle = {name: now.get(name, -1.0) for name in _IDLE}
        if not any(idle.values()) or time.monotonic() > deadline:
            return idle
        await asyncio.sleep(0.5)


async def steers_in_use(session: aiohttp.ClientSession) -> dict[str, int]:
    """The steers that a live request uses; none where the server does not list them."""
    async with session.get("/v1/steers", headers=HEADERS) as reply:
        if reply.status == 404:
            return {}
        data = (await reply.json())["data"]
    return {entry["id"]: entry["in_use"] for entry in data if entry.get("in_use")}


async def fill_room(
    session: aiohttp.ClientSession, contents: Sequence[Content]
) -> dict[str, dict[str, Any]]:
    """Unload all, then load until each region is full: how many it took, and the refusal after."""
    for name in NAMES:
        await post(session, "unload_steer", {"steer_name": name})
    filled = {}
    for region, places in PLACES.items():
        content = next((one for one in contents if one.region == region), None)
        if content is None:
            continue
        loaded, answer = 0, None
        deadline = time.monotonic() + LEASES_WITHIN_S
        while loaded <= places:
            body = {
                "steer_name": f"{region}.{loaded}",
                "steer_path": str(content.path),
                "default_strength": 2 + loaded,  # a place of its own
            }
            status, answer = await post(session, "load_steer", body)
            if status == 200:
                loaded += 1
            elif loaded == places or time.monotonic() > deadline:
                break
            else:
                await asyncio.sleep(0.5)
        is_full = NO_ROOM in str(answer)
        filled[region] = {"places": places, "loaded": loaded, "then refused": is_full}
        for number in range(loaded):
            await post(session, "unload_steer", {"steer_name": f"{region}.{number}"})
    return filled


class Memory:
    """Resident memory of all processes of a session, in MiB, by process and sample."""

    def __init__(self, session_id: int) -> None:
        self._session_id = session_id
        self.taken = 0
        self.samples: dict[str, list[float]] = defaultdict(list)

    def take(self) -> None:
        """Add a sample of each process."""
        self.taken += 1
        for pid, name in processes(self._session_id).items():
            resident = _resident_mib(pid)
            if resident is not None:
                self.samples[f"{name} {pid}"].append(resident)

    def growth(self) -> Mapping[str, dict[str, Any]]:
        """By process: the means of the second and of the last fifth, and whether it is flat."""
        return {
            name: _growth(samples, GROWTH_OF_WORKERS if name.startswith(WORKERS) else GROWTH)
            for name, samples in self.samples.items()
        }


def processes(session_id: int) -> dict[int, str]:
    """The processes of a session, by id: what each is called."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if int(fields[3]) == session_id and fields[0] != "Z":
            found[int(folder.name)] = command if command.startswith("VLLM::") else "server"
    return found


def _resident_mib(pid: int) -> float | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")]
    return sizes[0] if sizes else None


def _growth(samples: Sequence[float], share: float) -> dict[str, Any]:
    fifth = max(1, len(samples) // 5)
    second, fourth, last = (
        fmean(part or samples)
        for part in (samples[fifth : 2 * fifth], samples[-2 * fifth : -fifth], samples[-fifth:])
    )
    return {
        "second_fifth_mib": round(second, 1),
        "fourth_fifth_mib": round(fourth, 1),
        "last_fifth_mib": round(last, 1),
        "samples_mib": [round(sample) for sample in samples[:: max(1, len(samples) // 50)]],
        "is_flat": last <= second * (1 + share) + GROWTH_MIB
        and last <= fourth * (1 + LATE_GROWTH) + GROWTH_MIB,
    }
