"""Step deltas: a mean activation difference per generation step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_steer.steers.checks import check_choice, check_default_strength, check_tensor
from vllm_steer.steers.layers import check_layers, positions_of
from vllm_steer.steers.schedules import SCHEDULES, Schedule
from vllm_steer.steers.sites import DELTA_SITES, DeltaSite


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaSteer:
    """``h[P-1+i] <- h[P-1+i] + a_i * Delta[i]`` for generation step ``i``, prompt length ``P``.

    Step 0 is the last prompt token, from whose logits the first token is sampled. At strength ``v``

        fixed: a_i = v       start: a_0 = v, later 0       dim: a_i = v * (1 - i / steps)

    Tokens after the last step are not changed. Sums are in float32.

    Shapes: ``delta`` ``[steps, len(layers), hidden_size]`` where ``hidden_size`` is the width of
    the site: at ``heads``, the input of the attention's output projection, the concatenated heads.
    The authors' code takes the attention block's input on GPT-2 and GPT-NeoX: site ``attn_in``.
    ``recipe`` records how the steer was made, in plain JSON values.

    Raises ``SteerError`` for inconsistent sizes, non-finite values, an unknown site or schedule.

    Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic
    Activation Composition", BlackboxNLP 2024 (arXiv 2406.17563), sections 3.2 and 3.3.

    >>> import torch
    >>> steer = DeltaSteer(delta=torch.ones(30, 2, 8), layers=(4, 5), schedule="dim")
    >>> steer.steps, steer.layers, steer.site
    (30, (4, 5), 'heads')
    """

    delta: torch.Tensor = field(repr=False)
    layers: tuple[int, ...]
    site: DeltaSite = "heads"
    schedule: Schedule = "fixed"
    default_strength: float | None = None
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "delta"

    def __post_init__(self) -> None:
        check_choice("site", self.site, DELTA_SITES)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_default_strength(self.default_strength)
        check_tensor("delta", self.delta, dims=3)
        check_layers(self.layers, self.delta.shape[1], "delta")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their name in a steer file."""
        return {"delta": self.delta}

    @property
    def steps(self) -> int:
        """Number of generation steps, including step 0, the last prompt token."""
        return int(self.delta.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the site."""
        return int(self.delta.shape[2])

    def keep_layers(self, layers: tuple[int, ...]) -> "DeltaSteer":
        """The steer with some of its layers; ``SteerError`` for a layer that it does not have."""
        rows = positions_of(layers, self.layers)
        return replace(self, delta=self.delta[:, rows], layers=layers)
