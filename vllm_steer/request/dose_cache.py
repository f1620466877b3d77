"""Caches resolved values, so that a process resolves each value once."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Final

from vllm_steer.doses import Dose
from vllm_steer.request.value_limits import MAX_CHARACTERS, check_object

MAX_ENTRIES: Final = 256

Doses = tuple[Dose, ...]


class DoseCache:
    """LRU cache of at most ``MAX_ENTRIES`` resolved values.

    Errors are not cached. All caches are equal and pickle as empty, so that they affect neither
    comparison nor serialization of a plan.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._doses: OrderedDict[Any, Doses] = OrderedDict()

    def get(self, value: Any, resolve: Callable[[Any], Doses]) -> Doses:
        """The doses of a value; ``resolve`` computes them if they are not cached.

        A copy of the value is resolved, as another thread may modify the caller's dict.
        """
        if isinstance(value, Mapping):
            check_object(value)
            value = _copied(value)
        key = frozen(value)
        if key is None:
            return resolve(value)
        with self._lock:
            if key in self._doses:
                self._doses.move_to_end(key)
                return self._doses[key]
        doses = resolve(value)
        with self._lock:
            self._doses[key] = doses
            if len(self._doses) > MAX_ENTRIES:
                self._doses.popitem(last=False)
        return doses

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DoseCache)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["DoseCache"], tuple[()]]:
        return DoseCache, ()


def _copied(value: Any) -> Any:
    """Deep copy of a value within the limits, with mappings as dicts."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def frozen(value: Any) -> Any:
    """A hashable key of a value that distinguishes 1, 1.0 and True; None if there is none."""
    if type(value) is not dict and (type(value) is not str or len(value) > MAX_CHARACTERS):
        return None
    try:
        return _frozen(value)
    except TypeError:
        return None


def _frozen(value: Any) -> Any:
    if type(value) is dict:
        return dict, tuple((_frozen(key), _frozen(inner)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(map(_frozen, value))
    if type(value) in (str, int, float, bool, type(None)):
        return type(value), value
    raise TypeError
