"""What activation guidance works on: rules per request, a map per token, directions per layer.

A *direction* is a row of a site's tables: a vector steer has one, a delta steer one per generation
step; direction 0 is zero and means none. A request takes up to K doses at a site. Per step the
rules of the R requests in the batch become the map of its T tokens, once for all layers.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rules:
    """How R requests take K doses each, in a site of L layers; a dose that is not there is zero.

    For a token of request ``r`` at position ``p``, with ``i = p - origin``:

        direction = start + stride * i             if first <= p < last, else 0
        strength  = strength * (1 - slope * i)     if first <= p < last, else 0
                    history[table + i] instead     where table >= 0

    A dose with a table has a strength of its own at every step: ``strength`` and ``slope`` are not
    read then, and a step that ``history`` does not reach has strength 0.

    start, stride, origin, first, last   ``[K, R]`` int64
    strength, slope                      ``[K, R]`` float32
    layers                               ``[L, K, R]`` float32, 1 where the dose acts, else 0
    table                                ``[K, R]`` int64, the place of step 0; -1 for none
    history                              ``[N]`` float32, one number or more; may change on the
                                         device from call to call
    """

    start: torch.Tensor
    stride: torch.Tensor
    origin: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    strength: torch.Tensor
    slope: torch.Tensor
    layers: torch.Tensor
    table: torch.Tensor
    history: torch.Tensor

    @cached_property
    def takers(self) -> "Takers":
        """The requests that take anything, of rules in the host's memory."""
        takes = self.layers.numpy().any((0, 1))
        rows = np.flatnonzero(takes)
        names = ("start", "stride", "origin", "first", "last", "strength", "slope", "table")
        own = {name: getattr(self, name).numpy()[:, rows] for name in names}
        layers = self.layers.numpy()[:, :, rows]
        return Takers(
            rows=rows,
            column_of=np.where(takes, takes.cumsum() - 1, -1),
            **own,
            layers=layers,
            history=self.history.numpy(),
        )


@dataclass(frozen=True, eq=False)
class Takers:
    """The S of R requests that take anything, with their columns of ``Rules``.

    rows       ``[S]`` which of the R requests
    column_of  ``[R]`` the column of each request, -1 for none
    """

    rows: IntArray
    column_of: IntArray
    start: IntArray
    stride: IntArray
    origin: IntArray
    first: IntArray
    last: IntArray
    strength: FloatArray
    slope: FloatArray
    table: IntArray
    layers: FloatArray
    history: FloatArray


@dataclass(frozen=True)
class TokenMap:
    """Which direction each token takes at which strength; buffers that keep their addresses.

    directions  ``[K, N]`` int32
    strengths   ``[L, K, N]`` float32, 0 where a token takes nothing
    """

    directions: torch.Tensor
    strengths: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of both buffers."""
        return sum(t.numel() * t.element_size() for t in (self.directions, self.strengths))


@dataclass(frozen=True)
class Directions:
    """One site's tables: for each of L layers the same D directions, zero where a steer is not.

    vectors  ``[L, D, width]`` float32; unit vectors for a steer that rotates
    turns    ``[D]`` float32, 1 for directions that rotate; None if none does
    """

    vectors: torch.Tensor
    turns: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        """Device memory of the tables."""
        return self.vectors.numel() * self.vectors.element_size()
