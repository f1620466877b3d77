"""Settings of an LM-Steer fit, and its progress callback."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.lm_steer import VARIANTS, Variant


@dataclass(frozen=True, kw_only=True)
class LMSteerSettings:
    """Settings of a fit, described in ``fit_lm_steer``; defaults are the paper's.

    Raises ``SteerError`` for an invalid value.
    """

    variant: Variant = "multiply"
    rank: int = 1000
    epsilon: float = 1e-3
    initial_scale: float = 1e-2
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2
    regularization: float = 0.0
    max_length: int = 256
    dummy: bool = True
    mask_padding: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        for name, least in (("rank", 1), ("steps", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise SteerError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("epsilon", "initial_scale", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise SteerError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.regularization < math.inf:
            raise SteerError(f"regularization is {self.regularization}; expected 0 or more")
        if not 0 <= self.seed < 1 << 63:
            raise SteerError(f"seed is {self.seed}; expected a number from 0 to 2^63 - 1")

    @property
    def columns(self) -> int:
        """The steer's columns: the label's and the dummy's."""
        return 2 if self.dummy else 1


@dataclass(frozen=True, kw_only=True)
class FitCallbacks:
    """Progress callbacks.

    on_text     called with the number of texts read and their total
    on_step     called with a step and its loss
    on_message  called with messages for the user
    """

    on_text: Callable[[int, int], None] = lambda _done, _total: None
    on_step: Callable[[int, float], None] = lambda _step, _loss: None
    on_message: Callable[[str], None] = lambda _text: None


def check_labels(texts: Sequence[str], labels: Sequence[float]) -> None:
    """Raise ``SteerError`` for labels that are not one per text, out of [-1, 1] or all the same."""
    if not texts or len(texts) != len(labels):
        raise SteerError(
            f"{len(texts)} texts and {len(labels)} labels; give one label for each text"
        )
    outside = [label for label in labels if not -1 <= label <= 1]
    if outside:
        raise SteerError(f"label {outside[0]}; labels lie in [-1, 1]")
    if len(set(labels)) == 1:
        raise SteerError(
            f"all {len(labels)} labels are {labels[0]:g}; a fit needs texts with "
            "different labels; add texts with another label"
        )
