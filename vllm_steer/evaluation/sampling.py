"""Sampling settings, and the preset of the LM-Steer authors."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vllm_steer.errors import SteerError

_LARGEST_SEED: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: ``samples`` texts per prompt, text ``k`` with seed ``seed + k``.

    The seeds are the same for every prompt. ``exact_length`` suppresses the end-of-text token, so
    that every text has exactly ``max_tokens`` tokens. ``top_k`` 0 keeps the whole vocabulary;
    ``temperature`` 0 is greedy decoding, which allows one text per prompt only.

    Raises ``SteerError`` for values out of range.
    """

    samples: int = 25
    max_tokens: int = 20
    exact_length: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "samples": (self.samples >= 1, "at least 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            # The last text's seed must fit a signed 64-bit integer as well.
            "seed": (0 <= self.seed <= _LARGEST_SEED - self.samples, "0 to 2^63 - 1 - samples"),
        }
        for name, (is_valid, allowed) in checks.items():
            if not is_valid:
                raise SteerError(f"{name} is {getattr(self, name)}; allowed: {allowed}")
        if self.temperature == 0 and self.samples > 1:
            raise SteerError(
                f"samples is {self.samples}, and temperature 0 always generates the same text; "
                "give 1 sample"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling parameters as plain data."""
        return asdict(self)


PRESETS: Final[Mapping[str, Sampling]] = {
    # Han et al., ACL 2024 (arXiv 2305.12798), section 4, and the authors' generation script.
    "lm-steer": Sampling(samples=25, max_tokens=20, exact_length=True, top_k=50, top_p=0.9),
}


def sampling_of(preset: str | None, overrides: Mapping[str, Any]) -> Sampling:
    """A preset, or the defaults, with the overrides that are not None.

    Raises ``SteerError`` for an unknown preset and for values out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise SteerError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    base = Sampling() if preset is None else PRESETS[preset]
    return replace(base, **{name: value for name, value in overrides.items() if value is not None})
