"""One site inside the layers: its table, the step's token map, and the operation.

``SiteLayer`` is what the custom op finds in vLLM's forward context: one layer of one site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch

from vllm_steer.bank import SiteTable
from vllm_steer.compat.patching import unknown_behavior
from vllm_steer.kernels.guidance import GuidanceBackend, StepChanges, TokenMap, TokenRules
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.serving.token_rules import RequestColumns, guidance_rules

_BATCHES_KEPT = 4


class SiteState(Enum):
    """The state of a site before the next forward pass.

    WARMUP         a dummy run of start-up, which computes the widest step
    IDLE           nothing to do
    AWAITING_STEP  steered requests whose tokens are not known yet: a forward pass is an error
    READY          the step's tokens, mapped to what their requests take
    """

    WARMUP = auto()
    IDLE = auto()
    AWAITING_STEP = auto()
    READY = auto()


class SteeredSite:
    """The buffers of a site, written once per step for all of its layers.

    ``max_doses`` bounds the doses of one token, ``max_tokens`` the rows of a hidden state, padding
    included. Buffers keep their addresses, so a captured CUDA graph replays on what they hold then.
    """

    def __init__(
        self,
        table: SiteTable,
        backend: GuidanceBackend,
        *,
        max_doses: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.table = table
        self.is_disabled = False
        self.reached: set[int] = set()
        self._device = device
        self._backend = backend
        self._max_doses = max_doses
        self._depth = 0
        self._filled = 0
        self._changes: StepChanges | None = None
        self._state = self._unsteered_state = SiteState.WARMUP
        self._batch: list[str] | None = None
        self._rules: TokenRules
        self._columns: dict[str, RequestColumns] = {}
        self._made: dict[tuple[str, ...], TokenRules] = {}
        self._map = TokenMap(
            directions=torch.zeros(max_doses, max_tokens, dtype=torch.int32, device=device),
            strengths=torch.zeros(len(table.layers), max_doses, max_tokens, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of the token map."""
        return self._map.num_bytes

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the site runs on, for streams in ``dtype``."""
        self._backend.warm_up(
            self.table.directions,
            hidden_dtype=dtype,
            residual_dtype=dtype,
            num_doses=self._max_doses,
        )

    def invalidate(self) -> None:
        """The steered requests have changed: the next step makes its rules again."""
        self._batch = None
        self._made.clear()

    def begin_step(self) -> None:
        """A step with steered requests has begun: ``prepare`` has to precede its forward pass."""
        self._changes = None
        self._enter(SiteState.AWAITING_STEP)

    def disable(self) -> None:
        """The next forward pass is not steered at this site."""
        self._changes = None
        self._depth = 0
        self._clear(0)
        self._enter(self._unsteered_state)

    def start_serving(self) -> None:
        """Warm-up is over: forward passes without steered requests are not changed."""
        self._unsteered_state = SiteState.IDLE
        if self._state is SiteState.WARMUP:
            self._state = SiteState.IDLE

    def _enter(self, state: "SiteState") -> None:
        self._state = state
        # The op returns at once; on CUDA a graph may be under capture, which needs the operation.
        self.is_disabled = state is SiteState.IDLE and self._device.type != "cuda"

    def prepare(
        self, step: Step, requests: Mapping[str, SteeredRequest], strength_pool: torch.Tensor
    ) -> None:
        """Map the step's tokens to the directions that their requests take here.

        ``strength_pool`` has the strengths of dynamic doses; call ``invalidate`` before another
        tensor.
        """
        if step.req_ids != self._batch:
            self._batch = list(step.req_ids)
            self._rules = self._rules_of(tuple(self._batch), requests, strength_pool)
        depth = self._rules.direction_start.shape[0]
        if depth == 0:
            self.disable()
            return
        changes = self._backend.step_changes(
            self._rules, step.query_start_loc, step.positions, self.table.directions
        )
        if changes is not None and not changes:
            self.disable()
            return
        self._changes = changes
        self._enter(SiteState.READY)
        if changes is None:
            self._map_tokens(step, depth)

    def _map_tokens(self, step: Step, depth: int) -> None:
        if self._depth > depth:  # a captured graph reads them all, whatever the step's depth
            self._map.strengths[:, depth : self._depth].zero_()
        front = TokenMap(self._map.directions[:depth], self._map.strengths[:, :depth])
        self._backend.map_tokens(self._rules, step.query_start_loc, step.positions, front)
        self._depth = depth
        self._clear(step.positions.shape[0])

    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
        """Steer the tensor of the ``layer``-th hooked layer in place, or leave it at once."""
        if self._changes is not None:
            self._changes.add_(hidden.view(-1, hidden.shape[-1]), layer)
            return
        self.reached.add(layer)
        if self._state is SiteState.AWAITING_STEP:
            raise RuntimeError(
                unknown_behavior(f"a step reached {self.table.site} without its tokens")
            )
        depth = self._depth
        if _capturing(self._device) or self._state is SiteState.WARMUP:
            depth = self._max_doses
        if depth == 0:
            return
        rows = hidden.view(-1, hidden.shape[-1])
        if rows.shape[0] > self._map.directions.shape[1]:
            raise RuntimeError(
                unknown_behavior(
                    f"{rows.shape[0]} tokens at {self.table.site}, room for "
                    f"{self._map.directions.shape[1]}"
                )
            )
        residual_rows = None if residual is None else residual.view(-1, residual.shape[-1])
        self._backend.steer_tokens_(
            rows, residual_rows, self.table.directions, layer, self._map, depth
        )

    def _rules_of(
        self,
        req_ids: tuple[str, ...],
        requests: Mapping[str, SteeredRequest],
        strength_pool: torch.Tensor,
    ) -> TokenRules:
        """The rules of a batch; streams bring the same batches back in turns."""
        if req_ids not in self._made:
            if len(self._made) == _BATCHES_KEPT:
                del self._made[next(iter(self._made))]
            self._made[req_ids] = guidance_rules(
                req_ids, requests, self.table, strength_pool, self._columns
            )
        return self._made[req_ids]

    def _clear(self, num_tokens: int) -> None:
        """No strength beyond the step's tokens: a graph also runs on the padding after them."""
        if self._filled > num_tokens:
            self._map.strengths[:, :, num_tokens : self._filled].zero_()
        self._filled = num_tokens


@dataclass(frozen=True)
class SiteLayer:
    """One layer of one site, by the layer's index in the site's table."""

    site: SteeredSite
    layer: int

    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Steer the site's tensor in place."""
        self.site.steer_(hidden, residual, self.layer)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
