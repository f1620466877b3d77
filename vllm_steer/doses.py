"""A dose: one steer as one request takes it."""

from dataclasses import dataclass
from typing import Literal, get_args

from vllm_steer.steers.delta import Schedule

Phase = Literal["all", "prompt", "generation"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Dose:
    """A steer's name and strength, and where in the request and in the model it acts.

    layers    those of the steer's layers that it acts in; None for all of them
    phase     ``prompt`` tokens, tokens of the ``generation``, or ``all``: by what a token is
    schedule  of a delta steer; None for the other kinds
    """

    steer: str
    strength: float
    layers: tuple[int, ...] | None = None
    phase: Phase = "all"
    schedule: Schedule | None = None
