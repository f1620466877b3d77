"""Reader for a file whose format is known."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.files.steer_metadata import FORMAT_KEYS, SteerMetadata
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class FormatReader:
    """``format`` is the format's name; ``kind`` the steer's kind, None if the metadata decides it.

    ``accepted_keys`` are those of ``FORMAT_KEYS`` that apply to the format.
    """

    format: str
    kind: str | None
    read: Callable[[SteerMetadata], Steer]
    accepted_keys: tuple[str, ...] = ()

    def steer(self, overrides: SteerMetadata) -> Steer:
        """Read the steer. Raises ``SteerError`` for an override that does not apply."""
        if self.kind is not None and overrides.kind not in (None, self.kind):
            raise SteerError(
                f"the kind of {self.format} is {self.kind} and the key kind is {overrides.kind}; "
                "remove the key"
            )
        unused = [
            name
            for name in FORMAT_KEYS
            if name not in self.accepted_keys and getattr(overrides, name) is not None
        ]
        if unused:
            raise SteerError(f"{', '.join(unused)} does not apply to {self.format}; remove the key")
        return self.read(overrides)
