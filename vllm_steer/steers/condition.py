"""Conditions of steers: whether a prompt is of some kind, read from its hidden states."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice, check_tensor
from vllm_steer.steers.layers import check_layers, positions_of
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite

Similarity = Literal["cosine", "dot", "cast"]
SIMILARITIES: Final[tuple[Similarity, ...]] = get_args(Similarity)
Side = Literal["above", "below"]
SIDES: Final[tuple[Side, ...]] = get_args(Side)
Tokens = Literal["last", "any"]
TOKENS: Final[tuple[Tokens, ...]] = get_args(Tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionSteer:
    """A condition on a request's prompt: it changes nothing, and decides whether others act.

    It holds if the similarity of ``h``, the tensor at ``site`` of one layer, to the vector ``w`` is
    ``above`` (or ``below``) the threshold: at the prompt's ``last`` token, or at ``any`` of its
    tokens:

        cosine: (h . w) / (|h| |w|)
        dot:    h . w/|w|
        cast:   cos(h, tanh((h . w) w / (w . w)))

    A similarity of a zero vector is 0. ``h`` is what the layer gives under the steers of earlier
    layers and sites, and before any steer of its own. Sums are in float32.

    Shapes: ``vector`` ``[1, hidden_size]``, ``layers`` one 0-based layer.

    Raises ``SteerError`` for inconsistent sizes, non-finite values, a zero vector, or an unknown
    site, similarity, side or choice of tokens.

    Source: ``cast`` is Lee et al., "Programming Refusal with Conditional Activation Steering",
    ICLR 2025 (arXiv 2409.05907), section 3.2.

    >>> import torch
    >>> harmful = ConditionSteer(vector=torch.ones(1, 8), layers=(7,), threshold=0.05)
    >>> harmful.similarity, harmful.side, harmful.tokens
    ('cosine', 'above', 'last')
    """

    vector: torch.Tensor = field(repr=False)
    layers: tuple[int, ...]
    threshold: float
    site: VectorSite = "resid"
    similarity: Similarity = "cosine"
    side: Side = "above"
    tokens: Tokens = "last"
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "condition"
    schedule = None
    steps = None
    default_strength = None

    def __post_init__(self) -> None:
        check_choice("site", self.site, VECTOR_SITES)
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("side", self.side, SIDES)
        check_choice("tokens", self.tokens, TOKENS)
        check_tensor("vector", self.vector, dims=2)
        check_layers(self.layers, self.vector.shape[0], "vector")
        if len(self.layers) != 1:
            raise SteerError(
                f"a condition reads one layer, not {len(self.layers)}; make one per layer and join "
                "them in a request"
            )
        if not math.isfinite(self.threshold):
            raise SteerError(f"threshold is {self.threshold}; it must be finite")
        if not self.vector.float().any():
            raise SteerError("tensor vector is zero and has no direction")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their name in a steer file."""
        return {"vector": self.vector}

    @property
    def hidden_size(self) -> int:
        """Width of the site."""
        return int(self.vector.shape[1])

    def keep_layers(self, layers: tuple[int, ...]) -> "ConditionSteer":
        """The same condition; ``SteerError`` for a layer that it does not read."""
        positions_of(layers, self.layers)
        return self
