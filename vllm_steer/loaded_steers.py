"""The steers that were loaded at run time, as one process knows them."""

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

from vllm_steer.config import Limits
from vllm_steer.errors import SteerRequestError
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.request import DoseCache
from vllm_steer.request.options import SteerAttributes
from vllm_steer.request.resolution import SteerCatalog
from vllm_steer.untrusted_text import shown

_MOST_NAMES: Final = 64


class Names(NamedTuple):
    """The steers, presets and limits that resolve a request; steers loaded at run time included."""

    steers: Mapping[str, SteerAttributes]
    presets: Mapping[str, Mapping[str, Any]]
    limits: Limits


class LoadedSteers:
    """Steers that were loaded at run time, by their keys: what one process knows of them.

    All are equal and pickle as empty, so that they affect neither comparison nor serialization of a
    plan.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._steers: OrderedDict[str, PlannedSteer] = OrderedDict()
        self._names: OrderedDict[frozenset[tuple[str, str]], tuple[Names, DoseCache]] = (
            OrderedDict()
        )

    def __getitem__(self, key: str) -> PlannedSteer:
        return self._steers[key]

    def __contains__(self, key: object) -> bool:
        return key in self._steers

    def __len__(self) -> int:
        return len(self._steers)

    def add(self, steer: PlannedSteer, most: int | None = None) -> None:
        """Add a steer with a key, or note that it is used, and forget those that were not for the
        longest time if there are more than ``most``.
        """
        assert steer.key is not None
        with self._lock:
            self._steers[steer.key] = steer
            self._steers.move_to_end(steer.key)
            while most is not None and len(self._steers) > most:
                self._forget_names(self._steers.popitem(last=False)[0])

    def remove(self, key: str) -> None:
        """Forget a steer."""
        with self._lock:
            self._steers.pop(key, None)
            self._forget_names(key)

    def _forget_names(self, key: str) -> None:
        for names in [n for n in self._names if any(key == named for _, named in n)]:
            del self._names[names]

    def names(self, loaded: Mapping[str, str], plan: SteerCatalog) -> tuple[Names, DoseCache]:
        """The plan's steers and those of ``loaded`` by name, with the values resolved by them.

        Raises ``SteerRequestError`` for a key that this process does not know.
        """
        key = frozenset(loaded.items())
        with self._lock:
            if key in self._names:
                self._names.move_to_end(key)
                return self._names[key]
            for name, named in loaded.items():
                if named not in self._steers:
                    raise SteerRequestError(
                        f"steer {shown(name)} was unloaded while the request was on its way; send "
                        "it again"
                    )
            steers = {name: self._steers[named] for name, named in loaded.items()}
            names = Names({**plan.steers, **steers}, plan.presets, plan.limits), DoseCache()
            self._names[key] = names
            if len(self._names) > _MOST_NAMES:
                self._names.popitem(last=False)
            return names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedSteers)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["LoadedSteers"], tuple[()]]:
        return LoadedSteers, ()
