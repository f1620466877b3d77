"""One site inside the layers: the state of its step, and the step's map of tokens.

``SiteLayer`` is what the custom op finds in vLLM's forward context: one layer of one site.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch

from vllm_steer.compat.patching import unknown_behavior
from vllm_steer.kernels.guidance import GuidanceBackend, TokenMap, TokenRules
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.serving.token_rules import RequestColumns

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


class MappedSite(ABC):
    """The buffers of a site, written once per step for all of its ``layers``.

    ``max_depth`` bounds what one token takes. The map's buffers keep their addresses, so a captured
    CUDA graph replays on what they hold then.
    """

    def __init__(
        self,
        site: str,
        layers: Sequence[int],
        backend: GuidanceBackend,
        token_map: TokenMap,
        *,
        max_depth: int,
        device: torch.device,
    ) -> None:
        self.site = site
        self.layers = tuple(layers)
        self.is_disabled = False
        self.reached: set[int] = set()
        self._device = device
        self._backend = backend
        self._max_depth = max_depth
        self._map = token_map
        self._depth = 0
        self._filled = 0
        self._state = self._unsteered_state = SiteState.WARMUP
        self._batch: list[str] | None = None
        self._rules: TokenRules
        self._columns: dict[str, RequestColumns] = {}
        self._made: dict[tuple[str, ...], TokenRules] = {}

    @property
    def num_bytes(self) -> int:
        """Device memory of the token map."""
        return self._map.num_bytes

    def invalidate(self) -> None:
        """The steered requests have changed: the next step makes its rules again."""
        self._batch = None
        self._made.clear()

    def begin_step(self) -> None:
        """A step with steered requests has begun: ``prepare`` has to precede its forward pass."""
        self._enter(SiteState.AWAITING_STEP)

    def disable(self) -> None:
        """The next forward pass has nothing to do at this site."""
        self._depth = 0
        self._clear(0)
        self._enter(self._unsteered_state)

    def start_serving(self) -> None:
        """Warm-up is over: forward passes without steered requests are not changed."""
        self._unsteered_state = SiteState.IDLE
        if self._state is SiteState.WARMUP:
            self._state = SiteState.IDLE

    def prepare(
        self, step: Step, requests: Mapping[str, SteeredRequest], strength_pool: torch.Tensor
    ) -> None:
        """Map the step's tokens to what their requests take here.

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
        self._prepare(step, depth)

    @abstractmethod
    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the site runs on, for streams in ``dtype``."""

    @abstractmethod
    def _prepare(self, step: Step, depth: int) -> None:
        """Prepare a step with rules of this depth, which is not 0."""

    @abstractmethod
    def _make_rules(
        self,
        req_ids: Sequence[str],
        requests: Mapping[str, SteeredRequest],
        strength_pool: torch.Tensor,
    ) -> TokenRules:
        """The rules of a batch; ``self._columns`` keeps those of its requests."""

    @abstractmethod
    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
        """Do what the site does in the ``layer``-th of its layers."""

    def _enter(self, state: SiteState) -> None:
        self._state = state
        # The op returns at once; on CUDA a graph may be under capture, which needs the operation.
        self.is_disabled = state is SiteState.IDLE and self._device.type != "cuda"

    def _map_tokens(self, step: Step, depth: int) -> None:
        if self._depth > depth:  # a captured graph reads them all, whatever the step's depth
            self._map.strengths[:, depth : self._depth].zero_()
        self._backend.map_tokens(
            self._rules, step.query_start_loc, step.positions, self._map.front(depth)
        )
        self._depth = depth
        self._clear(step.positions.shape[0])
        self._enter(SiteState.READY)

    def _depth_of_pass(self, num_rows: int, layer: int) -> int:
        """How many doses of each token this forward pass reads, in a hidden state of ``num_rows``;
        0 for nothing to do.
        """
        self.reached.add(layer)
        if self._state is SiteState.AWAITING_STEP:
            raise RuntimeError(unknown_behavior(f"a step reached {self.site} without its tokens"))
        depth = self._depth
        if _capturing(self._device) or self._state is SiteState.WARMUP:
            depth = self._max_depth
        if depth and num_rows > self._map.directions.shape[1]:
            raise RuntimeError(
                unknown_behavior(
                    f"{num_rows} tokens at {self.site}, room for {self._map.directions.shape[1]}"
                )
            )
        return depth

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
            self._made[req_ids] = self._make_rules(req_ids, requests, strength_pool)
        return self._made[req_ids]

    def _clear(self, num_tokens: int) -> None:
        """No strength beyond the step's tokens: a graph also runs on the padding after them."""
        if self._filled > num_tokens:
            self._map.strengths[:, :, num_tokens : self._filled].zero_()
        self._filled = num_tokens


@dataclass(frozen=True)
class SiteLayer:
    """One layer of one site, by its index among the site's layers."""

    site: MappedSite
    layer: int

    def steer_(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Do what the site does with its tensor, in place."""
        self.site.steer_(hidden, residual, self.layer)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[tokens, width]``, a view."""
    return tensor.view(-1, tensor.shape[-1])


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
