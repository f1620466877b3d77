"""What every form of activation guidance offers."""

from typing import Protocol

import torch

from vllm_steer.kernels.guidance.host import HostChanges
from vllm_steer.kernels.guidance.operands import Directions, Rules, TokenMap


class GuidanceForm(Protocol):
    """A module with these functions."""

    def changes_of(
        self,
        rules: Rules,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        directions: Directions,
    ) -> HostChanges | None:
        """What the step adds in all layers, where that can be known before them.

        None leaves the step to ``map_tokens`` and, in each layer, to ``steer_tokens_``.
        """

    def map_tokens(
        self,
        rules: Rules,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        out: TokenMap,
    ) -> None:
        """Write the map of the step's tokens into ``out``; see ``Rules``.

        ``Rules.history`` is read on the device at this call; nothing waits for it, and no element
        outside of it is touched.
        """

    def steer_tokens_(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        directions: Directions,
        layer: int,
        token_map: TokenMap,
        depth: int,
    ) -> None:
        """Change ``hidden [T, width]`` in place by the first ``depth`` doses of each token."""

    def warm_up(
        self,
        directions: Directions,
        *,
        hidden_dtype: torch.dtype,
        residual_dtype: torch.dtype | None,
        num_doses: int,
    ) -> None:
        """Compile whatever these directions can call for maps of ``num_doses``, on their device."""
