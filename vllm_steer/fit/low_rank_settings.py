"""Settings of the fit of a low-rank map."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_steer.doses import Phase, TokenWindows
from vllm_steer.errors import SteerError
from vllm_steer.fit.low_rank_maps import PARAMETERIZATIONS, Parameterization
from vllm_steer.request.phases import read_phase
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """Settings of a fit, described in ``fit_low_rank``. Raises ``SteerError`` for an invalid
    value.
    """

    parameterization: Parameterization = "loreft"
    rank: int = 4
    layers: tuple[int, ...] | None = None
    site: VectorSite = "resid"
    phase: str | Mapping[str, Any] = "all"
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    valid_share: float = 0.1
    max_length: int = 256
    chat_template: bool = False
    end_of_text: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("parameterization", self.parameterization, PARAMETERIZATIONS)
        check_choice("site", self.site, VECTOR_SITES)
        for name, least in (("rank", 1), ("steps", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise SteerError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise SteerError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise SteerError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if not 0 <= self.valid_share < 1:
            raise SteerError(f"valid_share is {self.valid_share}; expected 0 or more, below 1")
        if not 0 <= self.seed < 1 << 63:
            raise SteerError(f"seed is {self.seed}; expected a number from 0 to 2^63 - 1")
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0
        ):
            raise SteerError(f"layers is {list(self.layers)}; expected different numbers from 0 on")
        _ = self.tokens

    @property
    def tokens(self) -> Phase | TokenWindows:
        """The phase or windows of the tokens that the map acts on."""
        return read_phase("to fit", self.phase, "all")
