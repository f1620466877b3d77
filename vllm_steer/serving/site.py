"""One site where steers act inside the layers: its table, the step's token map, the operation."""

from collections.abc import Mapping, Sequence

import torch

from vllm_steer.bank import SiteTable
from vllm_steer.kernels.guidance import Gates, GuidanceBackend, StepChanges, TokenMap, TokenRules
from vllm_steer.kernels.lm_steer import GraphLMSteerBackend, LMSteerBackend
from vllm_steer.serving.low_rank_pairs import GraphPairs, LowRankPairs, low_rank_pairs
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
        self._pairs_key: tuple[tuple[str, ...], bytes] | None = None
        self._kept_pairs: LowRankPairs | None = None
        self._graph_tokens = graph_tokens
        self._graph_pairs: GraphPairs | None = None
        if table.maps is not None and graph_tokens:
            assert isinstance(lm_steer, GraphLMSteerBackend)  # start-up has checked it
            self._graph_pairs = GraphPairs(
                table.maps, lm_steer, max_doses=max_doses, max_tokens=graph_tokens, device=device
            )

    @property
    def num_bytes(self) -> int:
        """Device memory of the token map, and of the pairs of maps in graphs."""
        return super().num_bytes + (0 if self._graph_pairs is None else self._graph_pairs.num_bytes)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the site runs on, for streams in ``dtype``."""
        dtypes = {dtype} if self.table.maps is None else {dtype, torch.float32}
        for hidden_dtype in dtypes:
            self._backend.warm_up(
                self.table.directions,
                hidden_dtype=hidden_dtype,
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
        if self._graph_pairs is not None:
            self._graph_pairs.clear()
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
        if self.table.maps is None or self._lm_steer is None:
            self._backend.steer_tokens_(
                rows, of_stream, self.table.directions, layer, self._map, depth
            )
        else:
            self._steer_with_maps_(rows, of_stream, layer, depth)

    def _steer_with_maps_(
        self, rows: torch.Tensor, residual: torch.Tensor | None, layer: int, depth: int
    ) -> None:
        """Directions and maps read the same tensor; their sum is in float32, and rounded once."""
        assert self.table.maps is not None and self._lm_steer is not None
        if self._pairs is None and self._graph_pairs is None:
            self._backend.steer_tokens_(
                rows, residual, self.table.directions, layer, self._map, depth
            )
            return
        wide = rows.to(torch.float32, copy=True)
        x = rows.float() if residual is None else rows.float() + residual.float()
        self._backend.steer_tokens_(wide, residual, self.table.directions, layer, self._map, depth)
        if self._pairs is not None:
            self._pairs.add_(wide, x, self.table.maps, layer, self._map, self._lm_steer)
        elif self._graph_pairs is not None:
            front = slice(0, self._graph_tokens)  # rows beyond a step's tokens are padding
            self._graph_pairs.add_(wide[front], x[front], layer, self._map)
        rows.copy_(wide)

    def prepare(
        self, step: Step, requests: Mapping[str, SteeredRequest], strength_pool: torch.Tensor
    ) -> None:
        """Map the step's tokens to the directions and maps that their requests take here."""
        self._pairs = None
        is_replayed = step.positions.shape[0] <= self._graph_tokens
        if self.table.maps is not None and self._lm_steer is not None and not is_replayed:
            self._pairs = self._pairs_of(step, requests, self._lm_steer)
        super().prepare(step, requests, strength_pool)

    def invalidate(self) -> None:
        """The steered requests have changed: the next step makes its rules and pairs again."""
        super().invalidate()
        self._pairs_key = None

    def _pairs_of(
        self, step: Step, requests: Mapping[str, SteeredRequest], backend: LMSteerBackend
    ) -> LowRankPairs | None:
        """The step's pairs, those of the step before if its batch was the same."""
        key = (tuple(step.req_ids), step.tokens.tobytes())
        if key != self._pairs_key:
            self._pairs_key = key
            self._kept_pairs = low_rank_pairs(step, requests, self.table, backend, self._device)
        return self._kept_pairs

    def _prepare(self, step: Step, depth: int) -> None:
        if self._pairs is not None or self._graph_pairs is not None:
            self._map_tokens(step, depth)
            if self._graph_pairs is not None and self._pairs is None:
                num_tokens = min(step.positions.shape[0], self._graph_tokens)
                self._graph_pairs.write(self._map, depth, num_tokens)
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
