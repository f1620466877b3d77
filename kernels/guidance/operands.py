"""The operands of activation guidance: rules per request, a map per token, directions per layer.

A *direction* is a row of a site's table: a vector steer has one, a step delta has one per
generation step; direction 0 is the zero vector and means none. A request has up to K doses at a
site. In each step the rules of the R requests of the batch are expanded to a map of its T tokens,
once for all layers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenRules:
    """How K doses of R requests act at a site in L layers; missing doses have strength 0.

    For a token of request ``r`` at position ``p``, with ``i = p - step0_position``:

        direction = direction_start + direction_stride * i      if begin <= p < end, else 0
        strength  = strength * (1 - slope * i)                  if begin <= p < end, else 0
                    strength_pool[pool_offset + i] instead      where pool_offset >= 0

    A dose with ``text_only`` leaves out the tokens that stand for images, audio or video: those
    between the bounds of a pair of ``placeholder_bounds``, which has for each range ``[b, e)`` of
    request ``r`` the two numbers ``r * PLACEHOLDER_STRIDE + b`` and ``r * PLACEHOLDER_STRIDE + e``.
    Ranges ascend and do not touch. Both fields are None where no dose leaves out any token.

    A dose with a pool offset reads its strength from the pool at every step: ``strength`` and
    ``slope`` are ignored, and a step beyond ``strength_pool`` has strength 0.

    direction_start, direction_stride, step0_position, begin, end   ``[K, R]`` int64
    strength, slope   ``[K, R]`` float32
    layers            ``[L, K, R]`` float32, 1 where the dose acts, else 0
    pool_offset       ``[K, R]`` int64, the index of step 0; -1 for none
    strength_pool     ``[N]`` float32, N at least 1; may change on the device from call to call
    text_only         ``[K, R]`` int64, 1 or 0
    placeholder_bounds   ``[B]`` int64, ascending
    """

    direction_start: torch.Tensor
    direction_stride: torch.Tensor
    step0_position: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    strength: torch.Tensor
    slope: torch.Tensor
    layers: torch.Tensor
    pool_offset: torch.Tensor
    strength_pool: torch.Tensor
    text_only: torch.Tensor | None = None
    placeholder_bounds: torch.Tensor | None = None

    @cached_property
    def active_requests(self) -> "ActiveRequests":
        """The requests with at least one dose; the rules must be in host memory."""
        is_active = self.layers.numpy().any((0, 1))
        rows = np.flatnonzero(is_active)
        doses = {name: getattr(self, name).numpy()[:, rows] for name in DOSE_FIELDS}
        return ActiveRequests(
            rows=rows,
            column_of=np.where(is_active, is_active.cumsum() - 1, -1),
            **doses,
            layers=self.layers.numpy()[:, :, rows],
            strength_pool=self.strength_pool.numpy(),
            text_only=None if self.text_only is None else self.text_only.numpy()[:, rows],
            placeholder_bounds=(
                None if self.placeholder_bounds is None else self.placeholder_bounds.numpy()
            ),
        )


PLACEHOLDER_STRIDE: Final = 2**40
"""The distance between two requests in ``TokenRules.placeholder_bounds``, beyond all positions."""


DOSE_FIELDS: Final = (
    *("direction_start", "direction_stride", "step0_position", "begin", "end"),
    *("strength", "slope", "pool_offset"),
)
"""The fields of ``TokenRules`` that are ``[K, R]``."""


@dataclass(frozen=True, eq=False)
class ActiveRequests:
    """The S of R requests with at least one dose, and their columns of ``TokenRules``.

    rows       ``[S]`` which of the R requests
    column_of  ``[R]`` the column of each request, -1 for none
    """

    rows: IntArray
    column_of: IntArray
    direction_start: IntArray
    direction_stride: IntArray
    step0_position: IntArray
    begin: IntArray
    end: IntArray
    strength: FloatArray
    slope: FloatArray
    pool_offset: IntArray
    layers: FloatArray
    strength_pool: FloatArray
    text_only: IntArray | None
    placeholder_bounds: IntArray | None


@dataclass(frozen=True)
class TokenMap:
    """The directions and strengths of each token; buffers that keep their addresses.

    directions  ``[K, N]`` int32
    strengths   ``[L, K, N]`` float32, 0 where a token has no dose
    """

    directions: torch.Tensor
    strengths: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of both buffers."""
        return sum(t.numel() * t.element_size() for t in (self.directions, self.strengths))


@dataclass(frozen=True)
class Directions:
    """One site's tables: D directions for each of L layers, zero in layers that a steer lacks.

    vectors      ``[L, D, width]`` float32; unit vectors for a steer of mode ``rotate``
    is_rotation  ``[D]`` float32, 1 for the directions of such steers; None if there are none
    """

    vectors: torch.Tensor
    is_rotation: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        """Device memory of the tables."""
        return self.vectors.numel() * self.vectors.element_size()
