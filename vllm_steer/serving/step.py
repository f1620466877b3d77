"""A step's requests, rows and tokens, as both model runners report them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.doses import Dose
from vllm_steer.serving.gates import PromptTest

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SteeredRequest:
    """A request in flight that takes steers; ``prompt_len`` says which of its tokens are prompt.

    ``pool_offsets`` says by index of a dynamic dose where its strengths begin in the pool;
    ``placeholders`` has the bounds of the ranges that phase ``text`` leaves out, where a dose has
    that phase: see ``placeholders.placeholder_bounds``. ``gates`` says by index of a gated dose
    which gate it has, ``tests`` what decides about them: see ``serving.gates``.
    """

    doses: tuple[Dose, ...]
    prompt_len: int
    pool_offsets: Mapping[int, int] = field(default_factory=dict)
    placeholders: tuple[int, ...] = ()
    gates: Mapping[int, int] = field(default_factory=dict)
    tests: tuple[PromptTest, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """A step's requests in row order: their numbers of logits rows and of tokens on the host, their
    first tokens ``[R + 1]`` and each token's position ``[T]`` on the device.
    """

    req_ids: Sequence[str]
    logits: IntArray
    tokens: IntArray
    query_start_loc: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Rows of one tensor by request: ``counts[i]`` consecutive rows belong to ``req_ids[i]``."""

    req_ids: Sequence[str]
    counts: IntArray

    @cached_property
    def num_rows(self) -> int:
        """Rows in all."""
        return int(self.counts.sum())

    @cached_property
    def one_each(self) -> bool:
        """Whether every request has exactly one row: a step of decoding."""
        return bool((self.counts == 1).all())

    def same_as(self, other: "BatchRows | None") -> bool:
        """Whether both describe the same requests with the same rows in the same order."""
        return (
            other is not None
            and self.req_ids == other.req_ids
            and np.array_equal(self.counts, other.counts)
        )

    def window(self, start: int, length: int) -> "BatchRows":
        """The rows ``start`` to ``start + length`` only, as rows 0 to ``length``."""
        ends = np.cumsum(self.counts)
        inside = np.minimum(ends, start + length) - np.maximum(ends - self.counts, start)
        return BatchRows(self.req_ids, np.maximum(inside, 0))
