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

        direction = direction_start + direction_stride * i      if it acts there, else 0
        strength  = strength * (1 - slope * i)                  if it acts there, else 0
                    strength_pool[pool_offset + i] instead      where pool_offset >= 0

    A dose acts where ``begin[s] <= p < end[s]`` for one of its S spans; an empty span has none.

    A dose with ``text_only`` leaves out the tokens that stand for images, audio or video: those
    between the bounds of a pair of ``placeholder_bounds``, which has for each range ``[b, e)`` of
    request ``r`` the two numbers ``r * PLACEHOLDER_STRIDE + b`` and ``r * PLACEHOLDER_STRIDE + e``.
    Ranges ascend and do not touch. Both fields are None where no dose leaves out any token.

    A dose with a pool offset reads its strength from the pool at every step: ``strength`` and
    ``slope`` are ignored, and a step beyond ``strength_pool`` has strength 0.

    direction_start, direction_stride, step0_position   ``[K, R]`` int64
    begin, end        ``[S, K, R]`` int64, S at least 1
    strength, slope   ``[K, R]`` float32
    layers            ``[L, K, R]`` float32, 1 where the dose acts, else 0
    pool_offset       ``[K, R]`` int64, the index of step 0; -1 for none
    strength_pool     ``[N]`` float32, N at least 1; may change on the device from call to call
    text_only         ``[K, R]`` int64, 1 or 0
    placeholder_bounds   ``[B]`` int64, ascending
    low, high         ``[K, R]`` float32, of directions that read; None where a site has none
    gate              ``[K, R]`` int64, 0 for none; None where an engine has no conditions
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
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    gate: torch.Tensor | None = None

    @cached_property
    def active_requests(self) -> "ActiveRequests":
        """The requests with at least one dose; the rules must be in host memory."""
        is_active = self.layers.numpy().any((0, 1))
        rows = np.flatnonzero(is_active)
        doses = {name: getattr(self, name).numpy()[..., rows] for name in DOSE_FIELDS}
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
            gate=None if self.gate is None else self.gate.numpy()[:, rows],
        )


PLACEHOLDER_STRIDE: Final = 2**40
"""The distance between two requests in ``TokenRules.placeholder_bounds``, beyond all positions."""


DOSE_FIELDS: Final = (
    *("direction_start", "direction_stride", "step0_position", "begin", "end"),
    *("strength", "slope", "pool_offset"),
)
"""The fields of ``TokenRules`` that are ``[K, R]``, or ``[S, K, R]``."""


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
    gate: IntArray | None


@dataclass(frozen=True)
class Gates:
    """Whether the gated doses of requests act: G gates with up to C conditions each.

    Gate ``g`` is open where ``sum_c verdicts[g, c] >= needed[g]``; gate 0 always is.

    verdicts  ``[G, C]`` float32, 1 for a condition that holds, else 0
    needed    ``[G]`` float32
    """

    verdicts: torch.Tensor
    needed: torch.Tensor

    def are_open(self, gate: torch.Tensor) -> torch.Tensor:
        """Which of some gates are open, bool, in the shape of ``gate``."""
        held: torch.Tensor = self.verdicts[gate].sum(-1)
        return held >= self.needed[gate]


@dataclass(frozen=True)
class TokenMap:
    """The directions and strengths of each token; buffers that keep their addresses.

    directions  ``[K, N]`` int32
    strengths   ``[L, K, N]`` float32, 0 where a token has no dose
    low, high   ``[K, N]`` float32, for directions that read; else None
    gate        ``[K, N]`` int32; the gate of each dose among ``gates``, which is read in each
                layer; None where an engine has no conditions
    """

    directions: torch.Tensor
    strengths: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    gates: Gates | None = None

    @property
    def num_bytes(self) -> int:
        """Device memory of the buffers of tokens."""
        buffers = (self.directions, self.strengths, self.low, self.high, self.gate)
        return sum(t.numel() * t.element_size() for t in buffers if t is not None)

    def front(self, depth: int) -> "TokenMap":
        """The map of the first ``depth`` doses."""
        low, high, gate = (
            None if buffer is None else buffer[:depth]
            for buffer in (self.low, self.high, self.gate)
        )
        return TokenMap(
            self.directions[:depth], self.strengths[:, :depth], low, high, gate, self.gates
        )


@dataclass(frozen=True)
class Readings:
    """What the strength of a direction is multiplied by, where that depends on the token ``x``.

    For direction ``d`` of layer ``l``, with the reader ``r = reader_of[d]`` and the dose's bounds:

        a = x . vectors[l, r] + bias[l, r]           f = a if a > threshold[l, r], else 0
        factor = gains[d] . (1, |x|, clip(f, low, high), f)

    reader_of        ``[D]`` int32, -1 for a direction that reads nothing: its f is 0
    gains            ``[D, 4]`` float32
    vectors          ``[L, readers, width]`` float32, at least one reader
    bias, threshold  ``[L, readers]`` float32; a threshold of minus infinity is none
    """

    reader_of: torch.Tensor
    gains: torch.Tensor
    vectors: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of the tables."""
        tables = (self.reader_of, self.gains, self.vectors, self.bias, self.threshold)
        return sum(table.numel() * table.element_size() for table in tables)


GAINS: Final = {
    "constant": (1.0, 0.0, 0.0, 0.0),
    "norm": (0.0, 1.0, 0.0, 0.0),
    "clamp": (0.0, 0.0, 1.0, -1.0),
    "activation": (0.0, 0.0, 0.0, 1.0),
}
"""The gains of directions: what their strength is multiplied by."""


@dataclass(frozen=True)
class Directions:
    """One site's tables: D directions for each of L layers, zero in layers that a steer lacks.

    vectors      ``[L, D, width]`` float32; unit vectors for a steer of mode ``rotate``
    is_rotation  ``[D]`` float32, 1 for the directions of such steers; None if there are none
    readings     None if no direction's strength depends on the token
    """

    vectors: torch.Tensor
    is_rotation: torch.Tensor | None
    readings: Readings | None = None

    @property
    def needs_stream(self) -> bool:
        """Whether a change depends on the token, so that both halves of a stream are needed."""
        return self.is_rotation is not None or self.readings is not None

    @property
    def num_bytes(self) -> int:
        """Device memory of the tables."""
        of_readings = 0 if self.readings is None else self.readings.num_bytes
        return self.vectors.numel() * self.vectors.element_size() + of_readings


COSINE: Final = 0
DOT: Final = 1
CAST: Final = 2
"""The measures of ``Conditions``."""


@dataclass(frozen=True)
class Conditions:
    """The conditions that are read at one site: C of them, each in one of L layers.

    The similarity of a token ``x`` to ``u = vectors[l, c]``, a unit vector, is by ``measure[c]``

        0  (x . u) / |x|        1  x . u        2  the cosine of x and tanh((x . u) u)

    and 0 where a norm that it is divided by is 0. The condition holds at a token where ``sign[c] *
    similarity > sign[c] * threshold[c]``.

    vectors          ``[L, C, width]`` float32
    measure          ``[C]`` int32
    sign, threshold  ``[C]`` float32
    """

    vectors: torch.Tensor
    measure: torch.Tensor
    sign: torch.Tensor
    threshold: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of the vectors."""
        return self.vectors.numel() * self.vectors.element_size()
