"""The low-rank maps of a step at one site: which tokens take which map, and what they add.

The pairs of token and map follow from the requests of the batch and are known on the host; whether
a map acts on a token, and how strongly, is what the site's token map says on the device. Where a
CUDA graph replays the step, the pairs are read from the token map, too: see ``graph_changes``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.bank import SiteTable
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

    def changes(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        table: SiteTable,
        layer: int,
        token_map: TokenMap,
        backend: LMSteerBackend,
    ) -> torch.Tensor:
        """What the maps add to the touched tokens, ``[U, width]`` float32."""
        assert table.maps is not None
        x = hidden.index_select(0, self.tokens).float()
        if residual is not None:
            x += residual.index_select(0, self.tokens).float()
        strengths = token_map.strengths[layer][self.doses, self.tokens_of_pairs]
        if token_map.gate is not None and token_map.gates is not None:
            gate = token_map.gate[self.doses, self.tokens_of_pairs]
            strengths = strengths * token_map.gates.are_open(gate)
        self.metadata.scales.copy_(strengths)
        return backend.steer_rows(x, table.maps.weights[layer], self.metadata).sub_(x)

    def add_(self, hidden: torch.Tensor, changes: torch.Tensor) -> None:
        """Add the changes to the touched tokens of ``hidden``, rounded once."""
        rows = hidden.index_select(0, self.tokens).float().add_(changes)
        hidden.index_copy_(0, self.tokens, rows.to(hidden.dtype))


def graph_changes(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    table: SiteTable,
    layer: int,
    token_map: TokenMap,
    depth: int,
    backend: GraphLMSteerBackend,
) -> torch.Tensor:
    """What the maps add to every token, ``[T, width]`` float32; what is launched depends on the
    number of tokens alone.
    """
    assert table.maps is not None
    maps, num_tokens = table.maps, hidden.shape[0]
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    total = torch.zeros_like(x)
    for k in range(depth):
        strengths = token_map.strengths[layer, k, :num_tokens]
        if token_map.gate is not None and token_map.gates is not None:
            strengths = strengths * token_map.gates.are_open(token_map.gate[k, :num_tokens])
        slots = maps.slot_of_direction[token_map.directions[k, :num_tokens]]
        weights = maps.weights[layer]
        metadata = backend.prepare_rows(slots, strengths.contiguous(), maps.bounds, weights)
        total += backend.steer_rows(x, weights, metadata) - x
    return total


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
