"""The cases of LM-Steer: which row of a batch takes which steers, as plain numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from operations.floors import lm_steer_bytes, lm_steer_flops

MIXED_RANKS = (8, 64, 256)


@dataclass(frozen=True)
class Shape:
    """Width of the hidden state and rank of its steers; 1280x1000 in words."""

    width: int
    rank: int

    @property
    def dense(self) -> bool:
        """Whether the bank keeps the product of the factors, which is smaller."""
        return self.width < 2 * self.rank

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From its words. Raises ``ValueError`` for others."""
        width, rank = map(int, text.split("x"))
        if min(width, rank) < 1:
            raise ValueError(f"{text!r}: WIDTHxRANK is wanted, as in 4096x64")
        return cls(width, rank)


@dataclass(frozen=True)
class LMSteerCase:
    """A batch. Its distinct steers have ``ranks`` in turn; ``share`` of the rows take ``per_row``
    of them each, in turn or by ``zipf`` popularity (the k-th steer's rows in proportion to 1/k).
    """

    name: str
    width: int
    ranks: tuple[int, ...]
    rows: int
    distinct: int
    per_row: int = 1
    share: float = 1.0
    popularity: Literal["turns", "zipf"] = "turns"

    @property
    def dense(self) -> bool:
        """Whether the bank keeps these steers as products."""
        return Shape(self.width, min(self.ranks)).dense

    @cached_property
    def steers(self) -> tuple[tuple[int, ...], ...]:
        """Each row's steers, numbers below ``distinct``."""
        steered = steered_places(self.rows, self.share)
        first = range(len(steered))
        if self.popularity == "zipf":
            first = zipf_turns(len(steered), self.distinct)
        taken = dict(zip(steered, first, strict=True))
        return tuple(self._from(taken[row]) if row in taken else () for row in range(self.rows))

    def floor_bytes(self, itemsize: int) -> int:
        """The fewest bytes that the batch has to move."""
        used = sorted({steer for row in self.steers for steer in row})
        ranks = [self.rank_of(steer) for steer in used]
        return lm_steer_bytes(self.width, ranks=ranks, rows=self.rows, itemsize=itemsize)

    @property
    def flops(self) -> int:
        """Floating-point operations of all pairs of row and steer."""
        return lm_steer_flops(self.width, [self.rank_of(s) for row in self.steers for s in row])

    def rank_of(self, steer: int) -> int:
        """The rank of a steer."""
        return self.ranks[steer % len(self.ranks)]

    def _from(self, first: int) -> tuple[int, ...]:
        return tuple((first + nth) % self.distinct for nth in range(self.per_row))


def steered_places(rows: int, share: float) -> list[int]:
    """Rows that are steered, spread over the batch: at least one where the share is not zero."""
    count = max(1, round(share * rows)) if share else 0
    return [place * rows // count for place in range(count)]


def zipf_turns(rows: int, distinct: int) -> list[int]:
    """A steer for each row, the k-th with a weight of 1/k, spread over the batch."""
    owed = [0.0] * distinct
    total = sum(1 / (k + 1) for k in range(distinct))
    turns = []
    for _ in range(rows):
        owed = [debt + 1 / (k + 1) / total for k, debt in enumerate(owed)]
        turns.append(max(range(distinct), key=owed.__getitem__))
        owed[turns[-1]] -= 1
    return turns


def lm_steer_cases(
    shapes: Sequence[Shape], rows: Sequence[int], distinct: Sequence[int], special_rows: int
) -> Iterator[LMSteerCase]:
    """The grid of every shape, then the special cases at ``special_rows`` rows, if any."""
    for shape in shapes:
        size = (shape.width, (shape.rank,))
        for count in rows:
            for steers in sorted({min(steers, count) for steers in distinct}):
                yield LMSteerCase("grid", *size, count, steers)
        if special_rows:
            yield from _special_cases(shape, special_rows, max(distinct))


def _special_cases(shape: Shape, rows: int, most: int) -> Iterator[LMSteerCase]:
    size, most = (shape.width, (shape.rank,)), min(most, rows)
    few = min(4, most)
    yield LMSteerCase("zipf", *size, rows, most, popularity="zipf")
    for per_row in (2, 4):
        yield LMSteerCase("per_row", *size, rows, max(few, per_row), per_row)
    for share in (0.0, 0.01, 0.5):
        yield LMSteerCase("share", *size, rows, few, share=share)
    mixed = (*(rank for rank in MIXED_RANKS if rank < shape.rank), shape.rank)
    if not shape.dense and len(mixed) == 4 and most >= 4:
        yield LMSteerCase("mixed", shape.width, mixed, rows, most - most % 4)
