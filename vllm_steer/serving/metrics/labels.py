"""Values of the label ``steer``."""

from collections.abc import Container, Iterable
from typing import Final

from vllm_steer.config import NO_STEER
from vllm_steer.doses import Dose

STEER_FILES: Final = "steer_files"
"""Stands for all steers that requests bring in files of their own: their names are the client's."""
OTHER: Final = "_other"
"""Stands for steers beyond ``MOST_STEERS``; no steer can have this name."""
MOST_STEERS: Final = 1000

_names: dict[str, None] = {}


def steer_labels(doses: Iterable[Dose], known: Container[str]) -> tuple[str, ...]:
    """The label values that a request with these doses is counted under, each once.

    One for each of its steers, ``STEER_FILES`` for all that are not among the ``known`` names of
    the config and of loaded steers, and ``none`` for a request without a dose.
    """
    names = (dose.steer if dose.steer in known else STEER_FILES for dose in doses)
    return tuple(dict.fromkeys(map(bounded_label, names))) or (NO_STEER,)


def bounded_label(name: str) -> str:
    """The name, or ``OTHER`` for a new one once this process has used ``MOST_STEERS`` of them.

    A server on which steers are loaded under ever new names would otherwise keep series for all.
    """
    if name in _names or name in (NO_STEER, STEER_FILES):
        return name
    if len(_names) >= MOST_STEERS:
        return OTHER
    _names[name] = None
    return name
