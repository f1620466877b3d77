"""A finding: one line of the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warning", "FAILED", "not tested", "missing", "-"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and why or how much; ``figures`` are for ``--json``.

    ok          works
    warning     may work: nobody has tested it
    FAILED      should work and does not; the only state that makes the report a bad one
    not tested  could not be looked at, with the reason
    missing     this model does not have it, and needs not
    -           a fact
    """

    part: str
    name: str
    state: State
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_json(self) -> dict[str, Any]:
        """The finding as plain JSON values."""
        return asdict(self)
