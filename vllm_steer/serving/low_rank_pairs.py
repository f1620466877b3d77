"""The low-rank maps of a step at one site: which tokens take which map, and what they add.

The pairs of token and map follow from the requests of the batch and are known on the host; whether
a map acts on a token, and how strongly, is what the site's token map says on the device. Where a
CUDA graph replays the step, the pairs are read from the token map, too, into buffers that keep
their addresses: ``GraphPairs``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.bank import LowRankTable, SiteTable
from vllm_steer.kernels.guidance import TokenMap
from vllm_steer.kernels.lm_steer import GraphLMSteerBackend, LMSteerBackend, SteeredRows
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.step import SteeredRequest, Step


@dataclass(frozen=True, eq=False)
class LowRankPairs:
    """P pairs of a touched token and a map.

    metadata  the pairs as the backend prepared them, by index of the touched token
    tokens    ``[U]`` int64, the touched tokens, ascending
    doses, tokens_of_pairs   ``[P]`` int64: where the token map has the strength of each pair
    """

    metadata: Any
    tokens: torch.Tensor
    doses: torch.Tensor
    tokens_of_pairs: torch.Tensor

    def add_(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        maps: LowRankTable,
        layer: int,
        token_map: TokenMap,
        backend: LMSteerBackend,
    ) -> None:
        """Add what the maps make of ``x [T, width]`` to ``out``; both are float32."""
        x = x.index_select(0, self.tokens)
        strengths = token_map.strengths[layer][self.doses, self.tokens_of_pairs]
        if token_map.gate is not None and token_map.gates is not None:
            gate = token_map.gate[self.doses, self.tokens_of_pairs]
            strengths = strengths * token_map.gates.are_open(gate)
        self.metadata.scales.copy_(strengths)
        changes = backend.steer_rows(x, maps.weights[layer], self.metadata).sub_(x)
        out.index_add_(0, self.tokens, changes)


class GraphPairs:
    """A pair for every token and dose of a site, on the device; most have no map.

    Pair ``t * max_doses + k`` is the ``k``-th dose of token ``t``. ``write`` runs before the pass,
    ``add_`` in it: what it launches depends on the number of tokens alone.
    """

    def __init__(
        self,
        maps: LowRankTable,
        backend: GraphLMSteerBackend,
        *,
        max_doses: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self._maps = maps
        self._backend = backend
        self._max_doses = max_doses
        self._slots = torch.full((max_tokens * max_doses,), -1, dtype=torch.int32, device=device)
        self._metadata = backend.row_buffers(self._slots, maps.weights[0], max_doses)
        self._filled = 0

    @property
    def num_bytes(self) -> int:
        """Device memory of the buffers."""
        return self._slots.nbytes + int(self._metadata.num_bytes)

    def clear(self) -> None:
        """No token has a map."""
        if self._filled:
            most, self._filled = self._filled, 0
            self._slots[: most * self._max_doses] = -1
            self._backend.write_rows(self._metadata, self._slots, self._maps.bounds, most)

    def write(self, token_map: TokenMap, depth: int, num_tokens: int) -> None:
        """Read the maps of a step's tokens; those of ``num_tokens`` on have none."""
        most = max(num_tokens, self._filled)
        self._filled = num_tokens
        slots = self._slots.view(-1, self._max_doses)
        slots[:most] = -1
        directions = token_map.directions[:depth, :num_tokens]
        slots[:num_tokens, :depth] = self._maps.slot_of_direction[directions].T
        self._backend.write_rows(self._metadata, self._slots, self._maps.bounds, most)

    def add_(self, out: torch.Tensor, x: torch.Tensor, layer: int, token_map: TokenMap) -> None:
        """Add what the maps make of ``x [T, width]`` to ``out``; both are float32."""
        num_tokens = x.shape[0]
        strengths = token_map.strengths[layer, :, :num_tokens]
        if token_map.gate is not None and token_map.gates is not None:
            is_open = token_map.gates.are_open(token_map.gate[:, :num_tokens])
            strengths = strengths * is_open
        scales = strengths.T.reshape(-1)
        weights = self._maps.weights[layer]
        metadata = self._backend.first_rows(self._metadata, scales, num_tokens)
        changes = self._backend.steer_rows(x, weights, metadata).sub_(x)
        acts = (strengths != 0).any(0)[:, None]
        out.copy_(torch.where(acts, out + changes, out))  # 0 + -0 would be another bit


def low_rank_pairs(
    step: Step,
    requests: Mapping[str, SteeredRequest],
    table: SiteTable,
    backend: LMSteerBackend,
    device: torch.device,
) -> LowRankPairs | None:
    """The pairs of a step; None if no request of the batch has a map at this site."""
    assert table.maps is not None
    slots_of = {
        row: slots
        for row, req_id in enumerate(step.req_ids)
        if req_id in requests and (slots := _slots(requests[req_id], table))
    }
    if not slots_of:
        return None
    starts = np.cumsum(step.tokens) - step.tokens
    pairs = np.concatenate(
        [
            np.stack(np.broadcast_arrays(slot, dose, starts[row] + np.arange(step.tokens[row])))
            for row, slots in slots_of.items()
            for dose, slot in slots
        ],
        axis=1,
    )
    slots, doses, tokens = pairs[:, np.lexsort((pairs[2], pairs[0]))].astype(np.int64)
    touched, rows = np.unique(tokens, return_inverse=True)
    steered = SteeredRows(
        rows=rows.astype(np.int64),
        scales=np.ones(len(rows), dtype=np.float32),
        groups=_groups(slots),
    )
    metadata = backend.prepare(steered, table.maps.weights[0], device)
    return LowRankPairs(metadata, *upload([touched, doses, tokens], device))


def _slots(request: SteeredRequest, table: SiteTable) -> Sequence[tuple[int, int]]:
    """The doses of a request that are maps: the dose's index at the site, and its slot."""
    assert table.maps is not None
    here = [dose for dose in request.doses if dose.entry in table.entries]
    return [
        (index, table.maps.slots[dose.entry])
        for index, dose in enumerate(here)
        if dose.entry in table.maps.slots
    ]


def _groups(slots: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """``(slot, start, end)`` of slots sorted ascending."""
    used, starts = np.unique(slots, return_index=True)
    ends = [*starts[1:].tolist(), len(slots)]
    return tuple(zip(used.tolist(), starts.tolist(), ends, strict=True))
