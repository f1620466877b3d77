"""The interface of an activation guidance backend."""

from typing import Protocol

import torch

from vllm_steer.kernels.guidance.cpu import StepChanges
from vllm_steer.kernels.guidance.operands import (
    Conditions,
    Directions,
    Gates,
    TokenMap,
    TokenRules,
)


class GuidanceBackend(Protocol):
    """A module with these functions."""

    def step_changes(
        self,
        rules: TokenRules,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        directions: Directions,
        gates: Gates | None = None,
    ) -> StepChanges | None:
        """The changes of all layers, if they can be computed before the forward pass.

        If None, ``map_tokens`` and, in each layer, ``steer_tokens_`` compute them.
        """

    def map_tokens(
        self,
        rules: TokenRules,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        out: TokenMap,
    ) -> None:
        """Write the map of the step's tokens into ``out``; see ``TokenRules``.

        ``TokenRules.strength_pool`` is read on the device at this call, without waiting for it and
        within its bounds.
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

    def read_conditions_(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        conditions: Conditions,
        layer: int,
        token_map: TokenMap,
        depth: int,
    ) -> None:
        """Write 1 to the verdict of every condition that holds at a token tested for it.

        ``token_map`` has the condition of each token and test as its direction, a strength of 1 in
        the condition's layer, and the index of the verdict among all of ``gates`` as its gate.
        """

    def warm_up(
        self,
        directions: Directions,
        *,
        hidden_dtype: torch.dtype,
        residual_dtype: torch.dtype | None,
        num_doses: int,
        gates: Gates | None = None,
    ) -> None:
        """Compile all kernels for these directions and maps of ``num_doses``, on their device."""

    def warm_up_conditions(
        self, conditions: Conditions, dtype: torch.dtype, *, num_tests: int, gates: Gates
    ) -> None:
        """Compile all kernels for these conditions, streams in ``dtype`` and ``num_tests``."""
