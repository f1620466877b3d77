"""One site where conditions are read: the tests of a step's prompt tokens, and their verdicts."""

from collections.abc import Mapping, Sequence

import torch

from vllm_steer.bank import ConditionTable
from vllm_steer.kernels.guidance import Gates, GuidanceBackend, TokenMap, TokenRules
from vllm_steer.serving.mapped_site import MappedSite, as_rows
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.serving.token_rules import condition_rules


class ConditionSite(MappedSite):
    """A site whose tensor is read and not changed.

    ``max_tests`` bounds the tests of one token, ``max_tokens`` the rows of a hidden state, padding
    included.
    """

    def __init__(
        self,
        table: ConditionTable,
        backend: GuidanceBackend,
        gates: Gates,
        *,
        max_tests: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        shape = (max_tests, max_tokens)
        token_map = TokenMap(
            directions=torch.zeros(shape, dtype=torch.int32, device=device),
            strengths=torch.zeros(len(table.layers), *shape, device=device),
            gate=torch.zeros(shape, dtype=torch.int32, device=device),
            gates=gates,
        )
        super().__init__(
            table.site, table.layers, backend, token_map, max_depth=max_tests, device=device
        )
        self.table = table
        self._gates = gates

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the site runs on, for streams in ``dtype``."""
        self._backend.warm_up_conditions(
            self.table.conditions, dtype, num_tests=self._max_depth, gates=self._gates
        )

    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
        """Write the verdicts of the tests in the ``layer``-th hooked layer."""
        rows = as_rows(hidden)
        depth = self._depth_of_pass(rows.shape[0], layer)
        if depth == 0:
            return
        self._backend.read_conditions_(
            rows,
            None if residual is None else as_rows(residual),
            self.table.conditions,
            layer,
            self._map,
            depth,
        )

    def _prepare(self, step: Step, depth: int) -> None:
        if self._device.type == "cpu" and not self._has_prompt_tokens(step):
            self.disable()
        else:
            self._map_tokens(step, depth)

    def _has_prompt_tokens(self, step: Step) -> bool:
        """Whether any token of the step is tested; on the host, where its tensors are there."""
        last = self._rules.end.amax((0, 1))
        first = step.positions[step.query_start_loc[:-1].long()]
        return bool((first < last).any())

    def _make_rules(
        self,
        req_ids: Sequence[str],
        requests: Mapping[str, SteeredRequest],
        strength_pool: torch.Tensor,
    ) -> TokenRules:
        return condition_rules(req_ids, requests, self.table, strength_pool, self._columns)
