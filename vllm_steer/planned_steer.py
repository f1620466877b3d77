"""A checked steer of an engine, as plain JSON: its file, its properties and what it does."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_steer.config import Limits, SteerEntry
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.steers import (
    ConditionSteer,
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    Schedule,
    Side,
    Similarity,
    Steer,
    Tokens,
)
from vllm_steer.steers.content import content_digest


class ConditionTest(BaseModel):
    """What a condition does with the similarities that it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float
    similarity: Similarity
    side: Side
    tokens: Tokens


class PlannedSteer(BaseModel):
    """A checked steer: its path, its properties and the digest of its content.

    ``rank`` is that of an LM-Steer over all of its columns. ``key`` names a steer that was loaded
    at run time in the device tables; None for one of the config, which has its own name there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    path: Path
    overrides: dict[str, Any]
    kind: str
    site: str
    hidden_size: int | None
    vocab_size: int | None = None
    layers: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    steps: int | None = None
    default_strength: float
    content: str
    where_present: bool = False
    mode: str | None = None
    variant: str | None = None
    rank: int = 0
    has_bounds: bool = False
    low: float = 0.0
    high: float = 0.0
    condition: ConditionTest | None = None
    key: str | None = None

    @property
    def as_loaded(self) -> "PlannedSteer":
        """The steer with its ``key``: a digest of all that a request's doses take from it."""
        parts = [self.content, self.default_strength, self.where_present, self.schedule]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.model_copy(update={"key": f"sha256:{digest}"})

    def load(self, *, verifies: bool = True) -> Steer:
        """Read the steer again, in a process that has only the plan.

        ``verifies``: compare the content with what was checked; not needed for a file that this
        engine has just written itself. Raises ``SteerError`` if the file is gone or is no longer
        the one that was checked.
        """
        steer = load_steer(self.path, **self.overrides)
        if verifies and content_digest(steer) != self.content:
            raise SteerError(f"{self.path}: the file changed while the engine was starting")
        return steer


def plan_steer(name: str, entry: SteerEntry, limits: Limits) -> PlannedSteer:
    """Load and check one steer."""
    return plan_loaded(name, entry, load_entry(name, entry), limits)


def load_entry(name: str, entry: SteerEntry) -> Steer:
    """Load the file of a config's steer. Raises ``SteerError`` with the steer's name."""
    try:
        return load_steer(entry.path, **entry.overrides)
    except SteerError as error:
        raise SteerError(f"steer {name}: {error}") from error


def plan_loaded(name: str, entry: SteerEntry, steer: Steer, limits: Limits) -> PlannedSteer:
    """Check a steer that was loaded for an entry."""
    vocab_size = None
    if isinstance(steer, LMSteer):
        if entry.where_present:
            raise SteerError(
                f"steer {name}: layers does not apply to a steer of kind {steer.kind}; drop it"
            )
        vocab_size = steer.vocab_size
    if isinstance(steer, LMSteer | LowRankSteer) and steer.rank > limits.max_rank:
        raise SteerError(
            f"steer {name}: {entry.path}: rank is {steer.rank}; limits.max_rank is "
            f"{limits.max_rank}"
        )
    return PlannedSteer(
        path=entry.path,
        overrides=entry.overrides,
        kind=steer.kind,
        site=steer.site,
        hidden_size=steer.hidden_size if vocab_size is None else None,
        vocab_size=vocab_size,
        layers=steer.layers,
        schedule=steer.schedule,
        steps=steer.steps if isinstance(steer, DeltaSteer) else None,
        default_strength=1.0 if steer.default_strength is None else steer.default_strength,
        content=content_digest(steer),
        where_present=entry.where_present,
        mode=getattr(steer, "mode", None),
        variant=getattr(steer, "variant", None),
        rank=getattr(steer, "total_rank", getattr(steer, "rank", 0)),
        has_bounds=getattr(steer, "has_bounds", False),
        low=getattr(steer, "low", 0.0),
        high=getattr(steer, "high", 0.0),
        condition=_condition_test(steer),
    )


def _condition_test(steer: Steer) -> ConditionTest | None:
    if not isinstance(steer, ConditionSteer):
        return None
    return ConditionTest(
        threshold=steer.threshold,
        similarity=steer.similarity,
        side=steer.side,
        tokens=steer.tokens,
    )
