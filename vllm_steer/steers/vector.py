"""Steering vectors: one direction per layer, which is added, rotated towards or projected on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import (
    check_bounds,
    check_choice,
    check_default_strength,
    check_tensor,
)
from vllm_steer.steers.layers import check_layers, format_layers, positions_of
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite

Mode = Literal["add", "rotate", "project", "relative"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
UNIT_MODES: Final[tuple[Mode, ...]] = ("rotate", "project", "relative")
"""The modes that use the vector's direction and not its length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorSteer:
    """A direction ``w`` per layer, for every token of a request at strength ``v``.

        add:      h <- h + v * w
        rotate:   h <- (h + v * u) * |h| / |h + v * u|           u = w/|w|
        project:  h <- h + v * (clip(a, low, high) - a) * u      a = h . u
        relative: h <- h + v * |h| * u

    ``project`` moves the part of ``h`` along ``u`` into ``low`` to ``high``: both 0, at strength 1,
    removes it (directional ablation); an infinite bound is none. Several steers of one site read
    the same ``h``, and are summed before the single rescaling of ``rotate``. Sums are in
    float32. ``h`` depends on ``site``: ``resid`` is the residual stream after the layer,
    ``attn_in`` the output of the layer's input norm (the residual stream is unchanged),
    ``attn_out`` the output of the attention block before it is added to the residual stream.

    Shapes: ``vectors`` ``[len(layers), hidden_size]``, ``layers`` 0-based and ascending,
    ``layer_scores`` one number per layer or None. ``low`` and ``high`` are those of ``project``, in
    the units of ``h``; a request may give others. ``recipe`` records how the steer was made, in
    plain JSON values.

    Raises ``SteerError`` for inconsistent sizes, non-finite values, an unknown site or mode, bounds
    of another mode, ``low`` above ``high``, or a zero vector with another mode than ``add``.

    Source: ``rotate`` at ``attn_in`` is von Ruette et al., "A Language Model's Guide Through Latent
    Space", ICML 2024 (arXiv 2402.14433), section 3; ``add`` at ``resid`` is Turner et al.,
    "Activation Addition", 2023 (arXiv 2308.10248); ``project`` with bounds of 0 is the directional
    ablation of Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction",
    NeurIPS 2024 (arXiv 2406.11717), equation 4.

    >>> import torch
    >>> steer = VectorSteer(vectors=torch.ones(3, 8), layers=(4, 5, 6), mode="rotate")
    >>> steer.hidden_size, steer.keep_layers((5, 6)).layers
    (8, (5, 6))
    """

    vectors: torch.Tensor = field(repr=False)
    layers: tuple[int, ...]
    site: VectorSite = "resid"
    mode: Mode = "add"
    low: float = 0.0
    high: float = 0.0
    layer_scores: tuple[float, ...] | None = None
    default_strength: float | None = None
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "vector"
    schedule = None
    steps = None

    def __post_init__(self) -> None:
        check_choice("site", self.site, VECTOR_SITES)
        check_choice("mode", self.mode, MODES)
        check_default_strength(self.default_strength)
        check_bounds(self.low, self.high, self.mode, has_bounds=self.has_bounds)
        check_tensor("vectors", self.vectors, dims=2)
        check_layers(self.layers, self.vectors.shape[0], "vectors")
        if self.layer_scores is not None and len(self.layer_scores) != len(self.layers):
            raise SteerError(
                f"layer_scores has {len(self.layer_scores)} numbers for {len(self.layers)} layers"
            )
        rows = zip(self.layers, self.vectors, strict=True)
        zero = [layer for layer, row in rows if not row.float().any()]
        if self.mode in UNIT_MODES and zero:
            raise SteerError(
                f"the vector of layer {format_layers(zero)} is zero and has no direction for mode "
                f"{self.mode}; remove the layer"
            )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their name in a steer file."""
        return {"vectors": self.vectors}

    @property
    def has_bounds(self) -> bool:
        """Whether ``low`` and ``high`` say anything."""
        return self.mode == "project"

    @property
    def hidden_size(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])

    def keep_layers(self, layers: tuple[int, ...]) -> "VectorSteer":
        """The steer with some of its layers; ``SteerError`` for a layer that it does not have."""
        rows = positions_of(layers, self.layers)
        scores = self.layer_scores and tuple(self.layer_scores[row] for row in rows)
        return replace(self, vectors=self.vectors[rows], layers=layers, layer_scores=scores)
