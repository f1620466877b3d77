"""What the LM-Steer operation works on: packed tables of steers, and the rows that use them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SteerTables:
    """All resident steers of one width, packed; slot ``s`` owns rows ``bounds[s]:bounds[s+1]``.

    Mixed ranks lie side by side, nothing is padded. Of a slot's rows the first
    ``free_ranks[s]`` are scaled by the strength, the others (fixed columns) by 1.

        shrink      ``[total_rank, width]``, the P1^T of each slot; rows of a slot that does not
                    multiply are never read
        expand      ``[total_rank, width]``, the P2^T of each slot (or its vectors to add)
        multiplies  whether a slot's inner activation is ``x shrink^T`` or constant 1
        epsilons    one factor per slot
    """

    shrink: torch.Tensor
    expand: torch.Tensor
    bounds: tuple[int, ...]
    free_ranks: tuple[int, ...]
    multiplies: tuple[bool, ...]
    epsilons: tuple[float, ...]

    @property
    def num_bytes(self) -> int:
        """Device memory of both tables."""
        return sum(t.numel() * t.element_size() for t in (self.shrink, self.expand))


@dataclass(frozen=True)
class SteeredRows:
    """Which rows take which slot at which strength: P pairs, sorted by slot, then by row.

    rows       ``[P]`` int64, the row of each pair
    strengths  ``[P]`` float32
    groups     ``(slot, start, end)`` on the host: pairs ``start:end`` use ``slot``
    touched    ``[U]`` int64, every row of ``rows`` once, ascending
    places     ``[P]`` int64, where each pair's row stands in ``touched``
    """

    rows: torch.Tensor
    strengths: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]
    touched: torch.Tensor
    places: torch.Tensor
