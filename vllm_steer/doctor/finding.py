"""Findings: the lines of the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warning", "FAILED", "not tested", "missing", "-"]


@dataclass(frozen=True)
class Finding:
    """A check with its state, and a message with the reason or the value.

    ``figures`` has the numbers behind it, for ``--json``. The states:

        ok          works
        warning     may work, but is untested
        FAILED      should work and does not; the only state that makes the report fail
        not tested  could not be checked, with the reason
        missing     this model does not have it and does not need it
        -           information
    """

    part: str
    name: str
    state: State
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        data = asdict(self)
        return {"said" if key == "message" else key: value for key, value in data.items()}
