"""The names of the steers that were loaded at run time, in a file.

All API servers of one server read the same file: a change is a new file in place of the old one, so
that a request sees all of a change or nothing of it. Whoever changes it holds the lock, which the
operating system takes back from a process that dies.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.files.atomic_write import finished_name, write_text
from vllm_steer.files.json_text import read_json
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.request.gates import names_in
from vllm_steer.runtime.steer_file import SUFFIX, UPLOAD

FILE: Final = "loaded-steers.json"
_LOCK: Final = "lock"
_VERSION: Final = 1
MOST_KNOWN: Final = 4096
"""Steers that a frontend remembers by their keys."""
_LONGEST_LOAD: Final = 3600.0

Seen = tuple[int, int, int, int] | None


@dataclass(frozen=True, eq=False)
class LoadedNames:
    """What the names of loaded steers mean at one time."""

    steers: Mapping[str, PlannedSteer] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The keys of all of them, which stay in device memory."""
        return sorted({str(steer.key) for steer in self.steers.values()})

    def loaded_by(self, value: Any, plan: SteerPlan) -> Mapping[str, str]:
        """By name, the keys of the steers and conditions that a request's ``steer`` value names;
        ``plan`` knows them from now on.

        All of them where the value names something unknown: the error lists what there is.
        """
        if not self.steers or value is None:
            return {}
        try:
            named = names_in(value)
        except SteerError:
            return {}
        is_known = named <= {*self.steers, *plan.steers, *plan.presets}
        loaded = {n: steer for n, steer in self.steers.items() if n in named or not is_known}
        for steer in loaded.values():
            plan.loaded.add(steer, MOST_KNOWN)
        return {name: str(steer.key) for name, steer in loaded.items()}

    def with_steers(self, steers: Mapping[str, PlannedSteer]) -> "LoadedNames":
        """These names, and those of a request's own steers, which come first."""
        return LoadedNames({**self.steers, **steers}) if steers else self


class Registry:
    """The names in a folder, as this process last saw them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self._seen: Seen = None
        self._names = LoadedNames()

    def names(self) -> LoadedNames:
        """What the names mean now; the file is read again only where it has changed."""
        seen = self._status()
        if seen is not None and seen != self._seen:  # a file that was cleaned away changes nothing
            self._names, self._seen = self._read(), seen
        return self._names

    def write(self, steers: Mapping[str, PlannedSteer]) -> None:
        """Replace all names. The caller holds the lock."""
        data = {
            "version": _VERSION,
            "steers": {name: json.loads(steers[name].model_dump_json()) for name in sorted(steers)},
        }
        write_text(self.path, json.dumps(data, indent=1))
        self.names()

    def make_folder(self) -> None:
        """Make the folder again if somebody has cleaned it away."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def try_lock(self) -> int | None:
        """The lock, for ``unlock``; None while somebody else changes what is loaded."""
        self.make_folder()
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    @staticmethod
    def unlock(lock: int) -> None:
        """Give the lock back."""
        os.close(lock)

    def remove_leftovers(self, age: float = _LONGEST_LOAD) -> None:
        """Remove the files of loads that a killed process left, ``age`` seconds ago or longer.

        The caller holds the lock; a process that does not may be about to load a newer file.
        """
        named = {steer.path.name for steer in self.names().steers.values()}
        newest = time.time() - age
        for entry in list(os.scandir(self.folder)):
            finished = finished_name(entry.name)
            own = finished or entry.name
            is_ours = own.endswith(SUFFIX) or own.startswith(UPLOAD) or finished == FILE
            with suppress(FileNotFoundError):
                if is_ours and entry.name not in named and entry.stat().st_mtime <= newest:
                    os.unlink(entry.path)

    def _status(self) -> Seen:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def _read(self) -> LoadedNames:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return LoadedNames()
        except (OSError, UnicodeDecodeError) as error:
            raise SteerError(f"{self.path}: cannot be read ({error})") from None
        data = read_json(text, str(self.path))
        if not isinstance(data, Mapping) or data.get("version") != _VERSION:
            raise SteerError(
                f"{self.path}: is not a list of loaded steers of version {_VERSION}; remove it to "
                "start with none"
            )
        try:
            steers = {
                name: PlannedSteer.model_validate(steer) for name, steer in data["steers"].items()
            }
        except (KeyError, AttributeError, TypeError, ValidationError) as error:
            raise SteerError(
                f"{self.path}: is damaged ({type(error).__name__}); remove it to start with none"
            ) from None
        return LoadedNames(steers)
