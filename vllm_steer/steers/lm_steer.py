"""LM-Steer: a low-rank linear map of the input of the LM head."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice, check_default_strength, check_tensor
from vllm_steer.steers.sites import HEAD

Variant = Literal["multiply", "add", "offset"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

_TENSORS_OF: dict[Variant, tuple[str, ...]] = {
    "multiply": ("projector1", "projector2"),
    "add": ("add",),
    "offset": ("offset",),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LMSteer:
    """A linear map of the LM head's input, one per column (steered dimension of style).

    At strength ``v`` the hidden state ``c`` (after the final norm) becomes

        multiply: c + epsilon * sum_s a_s (c P1_s) P2_s^T
        add:      c + epsilon * sum_s a_s A_s
        offset:   logits + epsilon * sum_s a_s O_s   (before any soft cap or logit scale)

    where ``a_s`` is 1 for a fixed column (the paper's dummy steer) and ``v`` for every other;
    at ``v = 0`` no column is applied, not even a fixed one.

    Shapes: ``projector1``, ``projector2`` ``[columns, hidden_size, rank]``; ``add``
    ``[columns, hidden_size]``; ``offset`` ``[columns, vocab]``. Any floating dtype. ``recipe``
    records how the steer was made, in plain JSON values.

    Raises ``SteerError`` for missing or superfluous tensors, inconsistent sizes, non-finite values,
    an epsilon that is not positive, or columns that are all fixed.

    Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024
    (arXiv 2305.12798), section 3.

    >>> import torch
    >>> projector = torch.ones(2, 8, 4)  # two columns, hidden size 8, rank 4
    >>> steer = LMSteer(variant="multiply", epsilon=1e-3, hidden_size=8, fixed_columns=(1,),
    ...                 projector1=projector, projector2=projector)
    >>> steer.columns, steer.rank, steer.free_columns
    (2, 4, (0,))
    """

    variant: Variant
    epsilon: float
    hidden_size: int
    fixed_columns: tuple[int, ...] = ()
    projector1: torch.Tensor | None = field(default=None, repr=False)
    projector2: torch.Tensor | None = field(default=None, repr=False)
    add: torch.Tensor | None = field(default=None, repr=False)
    offset: torch.Tensor | None = field(default=None, repr=False)
    default_strength: float | None = None
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "lm_steer"
    site = HEAD
    layers = None
    schedule = None
    steps = None

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        _check_epsilon(self.epsilon)
        check_default_strength(self.default_strength)
        self._check_tensors()
        self._check_columns()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of this variant by their name in a steer file."""
        return {name: getattr(self, name) for name in _TENSORS_OF[self.variant]}

    @property
    def columns(self) -> int:
        """Number of steered dimensions in the file, fixed ones included."""
        return int(next(iter(self.tensors.values())).shape[0])

    @property
    def width(self) -> int:
        """Width of the steered rows: the hidden size, or the vocabulary size for ``offset``."""
        return self.vocab_size or self.hidden_size

    @property
    def rank(self) -> int:
        """Rank of one column's transform; 0 for ``add`` and ``offset``."""
        return int(self.projector1.shape[2]) if self.projector1 is not None else 0

    @property
    def total_rank(self) -> int:
        """Rank over all columns."""
        return self.rank * self.columns

    @property
    def free_columns(self) -> tuple[int, ...]:
        """Columns that are scaled by the request's strength."""
        return tuple(c for c in range(self.columns) if c not in self.fixed_columns)

    @property
    def vocab_size(self) -> int | None:
        """Width of ``offset``; None for the other variants."""
        return int(self.offset.shape[1]) if self.offset is not None else None

    def _check_tensors(self) -> None:
        expected = _TENSORS_OF[self.variant]
        present = [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]
        if sorted(present) != sorted(expected):
            raise SteerError(
                f"variant {self.variant} takes the tensors {', '.join(expected)}; "
                f"given: {', '.join(present) or 'none'}"
            )
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor, dims=3 if self.variant == "multiply" else 2)
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if self.variant == "multiply" and shapes["projector1"] != shapes["projector2"]:
            raise SteerError(
                f"projector1 is {shapes['projector1']} and projector2 is {shapes['projector2']}; "
                "they must have one shape [columns, hidden_size, rank]"
            )
        width = next(iter(shapes.values()))[1]
        if self.variant != "offset" and width != self.hidden_size:
            raise SteerError(f"tensor width is {width} but hidden_size is {self.hidden_size}")

    def _check_columns(self) -> None:
        if len(set(self.fixed_columns)) != len(self.fixed_columns):
            raise SteerError(f"fixed_columns {list(self.fixed_columns)} names a column twice")
        outside = [c for c in self.fixed_columns if not 0 <= c < self.columns]
        if outside:
            raise SteerError(
                f"fixed_columns {list(self.fixed_columns)}: this steer has columns "
                f"0 to {self.columns - 1}"
            )
        if not self.free_columns:
            raise SteerError(
                f"fixed_columns {list(self.fixed_columns)} contains all {self.columns} "
                "columns, so the strength would have no effect; leave at least one column free"
            )


def _check_epsilon(epsilon: float) -> None:
    if not (0 < epsilon < float("inf")):
        raise SteerError(f"epsilon is {epsilon}; it must be a positive, finite number")
