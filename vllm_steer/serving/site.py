"""One site where steers act inside the layers: its table, the step's token map, the operation."""

from collections.abc import Callable, Mapping, Sequence

import torch

from vllm_steer.bank import SiteTable
from vllm_steer.kernels.guidance import Gates, GuidanceBackend, StepChanges, TokenMap, TokenRules
from vllm_steer.kernels.lm_steer import GraphLMSteerBackend, LMSteerBackend
from vllm_steer.serving.low_rank_pairs import LowRankPairs, graph_changes, low_rank_pairs
from vllm_steer.serving.mapped_site import MappedSite, SiteState, as_rows
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.serving.token_rules import guidance_rules


class SteeredSite(MappedSite):
    """A site whose tensor is changed by the doses of its tokens.

    ``max_doses`` bounds the doses of one token, ``max_tokens`` the rows of a hidden state, padding
    included; ``gates`` are those of the engine's requests, None where it has no conditions.
    ``lm_steer`` computes low-rank maps, where the table has some. ``graph_tokens``: steps of up to
    so many tokens may be replayed by a CUDA graph.
    """

    def __init__(
        self,
        table: SiteTable,
        backend: GuidanceBackend,
        lm_steer: LMSteerBackend | None = None,
        *,
        max_doses: int,
        max_tokens: int,
        device: torch.device,
        gates: Gates | None = None,
        graph_tokens: int = 0,
    ) -> None:
        shape = (max_doses, max_tokens)
        reads = table.directions.readings is not None
        token_map = TokenMap(
            directions=torch.zeros(shape, dtype=torch.int32, device=device),
            strengths=torch.zeros(len(table.layers), *shape, device=device),
            low=torch.zeros(shape, device=device) if reads else None,
            high=torch.zeros(shape, device=device) if reads else None,
            gate=None if gates is None else torch.zeros(shape, dtype=torch.int32, device=device),
            gates=gates,
        )
        super().__init__(
            table.site, table.layers, backend, token_map, max_depth=max_doses, device=device
        )
        self.table = table
        self._lm_steer = lm_steer
        self._changes: StepChanges | None = None
        self._pairs: LowRankPairs | None = None
        self._graph_tokens = graph_tokens

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the site runs on, for streams in ``dtype``."""
        self._backend.warm_up(
            self.table.directions,
            hidden_dtype=dtype,
            residual_dtype=dtype,
            num_doses=self._max_depth,
            gates=self._map.gates,
        )
        if self.table.maps is not None and self._lm_steer is not None:
            self._lm_steer.warm_up(self.table.maps.weights[0], torch.float32)

    def begin_step(self) -> None:
        """A step with steered requests has begun: ``prepare`` has to precede its forward pass."""
        self._changes = self._pairs = None
        super().begin_step()

    def disable(self) -> None:
        """The next forward pass is not steered at this site."""
        self._changes = self._pairs = None
        super().disable()

    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
        """Steer the tensor of the ``layer``-th hooked layer in place, or leave it at once."""
        if self._changes is not None:
            self._changes.add_(as_rows(hidden), layer)
            return
        rows = as_rows(hidden)
        depth = self._depth_of_pass(rows.shape[0], layer)
        if depth == 0:
            return
        of_stream = None if residual is None else as_rows(residual)
        add_maps_ = self._maps_of_pass(rows, of_stream, layer, depth)
        self._backend.steer_tokens_(rows, of_stream, self.table.directions, layer, self._map, depth)
        if add_maps_ is not None:
            add_maps_()

    def _maps_of_pass(
        self, rows: torch.Tensor, residual: torch.Tensor | None, layer: int, depth: int
    ) -> Callable[[], object] | None:
        """Compute what low-rank maps add to the tensor as it is before; a function that adds it."""
        table, backend, pairs = self.table, self._lm_steer, self._pairs
        if table.maps is None or backend is None:
            return None
        if rows.shape[0] <= self._graph_tokens:
            assert isinstance(backend, GraphLMSteerBackend)  # start-up has checked it
            total = graph_changes(rows, residual, table, layer, self._map, depth, backend)
            return lambda: rows.copy_(rows.float() + total)
        if pairs is None:
            return None
        added = pairs.changes(rows, residual, table, layer, self._map, backend)
        return lambda: pairs.add_(rows, added)

    def prepare(
        self, step: Step, requests: Mapping[str, SteeredRequest], strength_pool: torch.Tensor
    ) -> None:
        """Map the step's tokens to the directions and maps that their requests take here."""
        self._pairs = None
        if self.table.maps is not None and self._lm_steer is not None:
            self._pairs = low_rank_pairs(step, requests, self.table, self._lm_steer, self._device)
        super().prepare(step, requests, strength_pool)

    def _prepare(self, step: Step, depth: int) -> None:
        if self._pairs is not None:
            self._map_tokens(step, depth)
            return
        changes = self._backend.step_changes(
            self._rules,
            step.query_start_loc,
            step.positions,
            self.table.directions,
            self._map.gates,
        )
        if changes is None:
            self._map_tokens(step, depth)
        elif changes:
            self._changes = changes
            self._enter(SiteState.READY)
        else:
            self.disable()

    def _make_rules(
        self,
        req_ids: Sequence[str],
        requests: Mapping[str, SteeredRequest],
        strength_pool: torch.Tensor,
    ) -> TokenRules:
        return guidance_rules(
            req_ids,
            requests,
            self.table,
            strength_pool,
            self._columns,
            gated=self._map.gates is not None,
        )
