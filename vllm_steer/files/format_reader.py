"""Reader for a file whose format is known."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.files.conversions import converted_kinds, read_converted
from vllm_steer.files.steer_metadata import FORMAT_KEYS, SteerMetadata
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class FormatReader:
    """``format`` is the format's name; ``kinds`` the kinds that ``read`` can return.

    ``kinds`` is empty where the file's metadata decides the kind. A file may also be read as a kind
    of ``conversions``, whose keys the format may determine: ``condition_defaults``.
    ``accepted_keys`` are those of ``FORMAT_KEYS`` that apply to the format.
    """

    format: str
    kinds: tuple[str, ...]
    read: Callable[[SteerMetadata], Steer]
    accepted_keys: tuple[str, ...] = ()
    condition_defaults: SteerMetadata | None = None

    def steer(self, overrides: SteerMetadata) -> Steer:
        """Read the steer. Raises ``SteerError`` for an override that does not apply."""
        others = converted_kinds(self.kinds)
        if self.kinds and overrides.kind not in (None, *self.kinds, *others):
            allowed = " or ".join((*self.kinds, *others))
            raise SteerError(
                f"the kind of {self.format} is {allowed} and the key kind is {overrides.kind}; "
                "remove the key"
            )
        unused = [
            name
            for name in FORMAT_KEYS
            if name not in self.accepted_keys and getattr(overrides, name) is not None
        ]
        if unused:
            raise SteerError(f"{', '.join(unused)} does not apply to {self.format}; remove the key")
        if overrides.kind in others:
            return read_converted(self.read, overrides, defaults=self.condition_defaults)
        return self.read(overrides)
