"""Loads and unloads steers on all engines of a frontend, or on none.

A steer is placed and written under its key, which no request uses yet. Once every rank of every
engine has it, its name is written to the registry, which all API servers read: from then on, and
not before, requests use it. If one rank fails, all forget it, and the names stay as they were.
"""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.refusal import CONFLICT, NOT_FOUND, UNFIT, Refused
from vllm_steer.runtime.registry import MOST_KNOWN, Registry
from vllm_steer.runtime.residency import check_fits
from vllm_steer.runtime.steer_file import check_name, store
from vllm_steer.serving.runtime.engines import Engines
from vllm_steer.serving.runtime.reserved_bank import READY, Reply
from vllm_steer.serving.startup_checks import check_steer

logger = logging.getLogger("vllm.vllm_steer")

LONGEST_LOAD: Final = 120.0
"""Seconds that a load may take, and that it may wait for others."""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.02, 0.5


@dataclass(frozen=True)
class SteerSource:
    """A steer to load: its file, or its bytes; and the keys of a steer in a config."""

    file: Path | bytes
    options: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """A digest of bytes and options."""
        assert isinstance(self.file, bytes)
        options = json.dumps(self.options, sort_keys=True, default=str).encode()
        return hashlib.sha256(hashlib.sha256(self.file).digest() + options).hexdigest()


class SteerLoading:
    """Changes what the engines of one frontend have loaded."""

    def __init__(
        self, plan: SteerPlan, vllm_config: Any, registry: Registry, engines: Engines
    ) -> None:
        self.plan = plan
        self.registry = registry
        self.engines = engines
        self._vllm_config = vllm_config
        self._checked: OrderedDict[str, PlannedSteer] = OrderedDict()

    async def load(self, name: Any, source: SteerSource, *, in_place: bool) -> PlannedSteer:
        """Load a steer under a name. Raises ``Refused``, and nothing has changed then.

        ``in_place`` replaces a steer that was loaded under this name; requests that use the old one
        keep it.
        """
        name = check_name(name)
        self._check_free(name, in_place=in_place)
        planned = await self.engines.in_thread(self._check, name, source)
        try:
            async with self._alone():
                self._check_free(name, in_place=in_place)
                steers = dict(self.registry.names().steers)
                before = steers.get(name)
                await self._make_resident(name, planned)
                steers[name] = planned
                self.registry.write(steers)
                await self._release(before, steers)
        finally:
            self._remove_file(planned, name)
        return planned

    async def unload(self, name: Any) -> PlannedSteer:
        """Take a name away; requests that use its steer keep it. Raises ``Refused``."""
        name = check_name(name)
        async with self._alone():
            steers = dict(self.registry.names().steers)
            if name not in steers:
                self._refuse_unknown(name)
            before = steers.pop(name)
            self.registry.write(steers)
            await self._release(before, steers)
        logger.info("vllm-steer: unloaded steer=%s digest=%s", name, before.content[:12])
        return before

    async def of_request(self, sources: Mapping[str, SteerSource]) -> Mapping[str, PlannedSteer]:
        """The steers that a request brings, on all engines until it comes. Raises ``Refused``."""
        known = {name: self._checked.get(source.digest) for name, source in sources.items()}
        steers = {name: steer for name, steer in known.items() if steer is not None}
        missing = await self._lease([str(steer.key) for steer in steers.values()])
        for name, source in sources.items():
            if name not in steers or steers[name].key in missing:
                steers[name] = await self._load_unnamed(check_name(name), source)
        return steers

    async def restore(self) -> None:
        """Load what the registry names, after a restart. Raises ``SteerError`` where that fails."""
        async with self._alone():
            self.registry.remove_leftovers()
            for name, steer in self.registry.names().steers.items():
                try:
                    self._check_no_config_name(name)
                    steer.load()  # the file may have changed while no engine ran
                    check_steer(name, steer, self._vllm_config)
                    check_fits(name, steer, self.plan.runtime.room)
                    await self._make_resident(name, steer)
                except SteerError as error:
                    raise SteerError(
                        f"steer {name}, loaded before the restart, cannot be loaded again: "
                        f"{error}; remove it from {self.registry.path}"
                    ) from None

    async def in_use(self) -> Mapping[str, int]:
        """Live requests by the steer's name in the device tables, over all engines."""
        counts: dict[str, int] = {}
        for reply in await self.engines.call("steer_usage"):
            for entry, count in reply["in_use"].items():
                counts[entry] = counts.get(entry, 0) + count
        return counts

    async def room(self) -> Mapping[str, tuple[int, int]]:
        """By region, the units that are taken and all units, of the fullest engine."""
        replies = await self.engines.call("steer_room", self.registry.names().keys)
        return {
            region: (max(reply["room"][region][0] for reply in replies), total)
            for region, (_, total) in replies[0]["room"].items()
        }

    async def _load_unnamed(self, name: str, source: SteerSource) -> PlannedSteer:
        planned = await self.engines.in_thread(self._check, name, source)
        try:
            async with self._alone():
                await self._make_resident(name, planned)
        finally:
            self._remove_file(planned, None)
        self._checked[source.digest] = planned
        self._checked.move_to_end(source.digest)
        while len(self._checked) > MOST_KNOWN:
            self._checked.popitem(last=False)
        return planned

    def _check(self, name: str, source: SteerSource) -> PlannedSteer:
        """Check a steer against model and room, and store it for the workers."""
        folder = self.registry.folder
        self.registry.make_folder()
        planned = store(name, source.file, source.options, self.plan.limits, folder)
        try:
            check_steer(name, planned, self._vllm_config)
            check_fits(name, planned, self.plan.runtime.room)
        except SteerError as error:
            self._remove_file(planned, None)
            raise Refused(str(error).replace(f"{planned.path}: ", "")) from None
        return planned

    def _remove_file(self, planned: PlannedSteer, name: str | None) -> None:
        """Remove a stored file, unless its name is loaded and is to survive a restart."""
        if self.plan.runtime.state is not None and name is not None:
            named = self.registry.names().steers.get(name)
            if named is not None and named.path == planned.path:
                return
        with suppress(FileNotFoundError):
            planned.path.unlink()

    def _check_free(self, name: str, *, in_place: bool) -> None:
        self._check_no_config_name(name)
        if name in self.registry.names().steers and not in_place:
            raise Refused(
                f"steer {name} is loaded already; unload it first, or set load_inplace to replace "
                "it",
                CONFLICT,
            )

    def _check_no_config_name(self, name: str) -> None:
        if name in self.plan.steers or name in self.plan.presets:
            kind = "steer" if name in self.plan.steers else "preset"
            raise Refused(
                f"{name} is a {kind} of the steer config, which stays as it is; choose another "
                "name",
                CONFLICT,
            )

    def _refuse_unknown(self, name: str) -> None:
        self._check_no_config_name(name)
        loaded = ", ".join(sorted(self.registry.names().steers)) or "none"
        raise Refused(f"no steer {name} was loaded at run time; loaded: {loaded}", NOT_FOUND)

    async def _make_resident(self, name: str, steer: PlannedSteer) -> None:
        """Load a steer on all ranks of all engines, or on none."""
        data, started = steer.model_dump(mode="json"), time.monotonic()
        kept, wait = self.registry.names().keys, _SHORTEST_WAIT
        try:
            _check(await self.engines.call("steer_read", data, name, kept))
            while not _check(await self.engines.call("steer_write", data)):
                if time.monotonic() - started > LONGEST_LOAD:
                    raise Refused(f"steer {name}: reading its file took too long")
                await self.engines.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        except BaseException:
            await self.engines.call("steer_forget", str(steer.key))
            raise

    async def _release(
        self, before: PlannedSteer | None, steers: Mapping[str, PlannedSteer]
    ) -> None:
        """Free the place and the file of a steer that has no name any more."""
        if before is None:
            return
        if before.path not in {steer.path for steer in steers.values()}:
            with suppress(FileNotFoundError):
                before.path.unlink()
        if before.key not in {steer.key for steer in steers.values()}:
            await self.engines.call("steer_release", [str(before.key)])

    async def _lease(self, keys: Sequence[str]) -> Collection[str]:
        """Keep steers for a request that is on its way; those that an engine does not have."""
        if not keys:
            return ()
        replies = await self.engines.call("steer_lease", keys)
        return {key for reply in replies for key in reply["missing"]}

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Nobody else changes what is loaded, in this process or in another API server."""
        started, wait = time.monotonic(), _SHORTEST_WAIT / 10
        while (lock := self.registry.try_lock()) is None:
            if time.monotonic() - started > LONGEST_LOAD:
                raise Refused("others have been loading steers for too long; try again", CONFLICT)
            await self.engines.sleep(wait)
            wait = min(2 * wait, _SHORTEST_WAIT)
        try:
            yield
        finally:
            self.registry.unlock(lock)


def _check(replies: Collection[Reply]) -> bool:
    """Whether all engines are ready. Raises ``Refused`` if one has failed."""
    for reply in replies:
        if "error" in reply:
            raise Refused(str(reply["error"]), int(reply.get("status", UNFIT)))
    return all(reply["state"] == READY for reply in replies)
