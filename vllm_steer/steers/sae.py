"""One feature of a sparse autoencoder, with its encoder: added, clamped or scaled."""

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
from vllm_steer.steers.layers import check_layers, positions_of
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite

SAEMode = Literal["add", "clamp", "scale"]
SAE_MODES: Final[tuple[SAEMode, ...]] = get_args(SAEMode)


@dataclass(frozen=True, kw_only=True, eq=False)
class SAESteer:
    """One feature ``f(h)`` of a sparse autoencoder per layer, for every token at strength ``v``.

        f(h) = p if p > threshold, else 0                      p = e . h + bias
        add:   h <- h + v * d
        clamp: h <- h + v * (clip(f(h), low, high) - f(h)) * d
        scale: h <- h + v * f(h) * d

    ``e`` is the feature's row of the encoder, ``d`` its row of the decoder. ``clamp`` with both
    bounds ``x``, at strength 1, sets the feature to ``x``; both 0 ablate it. ``scale`` at ``v``
    multiplies it by ``1 + v``. What the autoencoder does not reconstruct stays as it is. A
    threshold of 0 is a ReLU, a positive one a JumpReLU. Sums are in float32.

    Shapes: ``encoder`` and ``decoder`` ``[len(layers), hidden_size]``, ``bias`` and ``threshold``
    ``[len(layers)]``; ``layers`` 0-based and ascending. ``low`` and ``high`` are those of
    ``clamp``; a request may give others, and an infinite bound is none. ``recipe`` records how the
    steer was made, in plain JSON values.

    Raises ``SteerError`` for inconsistent sizes, non-finite values, an unknown site or mode, bounds
    of another mode, ``low`` above ``high``, or a negative threshold.

    Source: Templeton et al., "Scaling Monosemanticity", 2024 (feature steering); the JumpReLU is
    Rajamanoharan et al., 2024 (arXiv 2407.14435), equation 1, as in Gemma Scope (arXiv 2408.05147).

    >>> import torch
    >>> row, number = torch.ones(1, 8), torch.zeros(1)
    >>> steer = SAESteer(encoder=row, decoder=row, bias=number, threshold=number, layers=(20,))
    >>> steer.mode, steer.hidden_size
    ('clamp', 8)
    """

    encoder: torch.Tensor = field(repr=False)
    decoder: torch.Tensor = field(repr=False)
    bias: torch.Tensor = field(repr=False)
    threshold: torch.Tensor = field(repr=False)
    layers: tuple[int, ...]
    site: VectorSite = "resid"
    mode: SAEMode = "clamp"
    low: float = 0.0
    high: float = 0.0
    default_strength: float | None = None
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "sae"
    schedule = None
    steps = None

    def __post_init__(self) -> None:
        check_choice("site", self.site, VECTOR_SITES)
        check_choice("mode", self.mode, SAE_MODES)
        check_default_strength(self.default_strength)
        check_bounds(self.low, self.high, self.mode, has_bounds=self.has_bounds)
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor, dims=2 if name in ("encoder", "decoder") else 1)
            check_layers(self.layers, tensor.shape[0], name)
        if self.encoder.shape != self.decoder.shape:
            raise SteerError(
                f"tensor encoder is {list(self.encoder.shape)} and decoder "
                f"{list(self.decoder.shape)}; they must be equal"
            )
        if (self.threshold.float() < 0).any():
            raise SteerError("tensor threshold has negative values; a JumpReLU has none")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their name in a steer file."""
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "bias": self.bias,
            "threshold": self.threshold,
        }

    @property
    def has_bounds(self) -> bool:
        """Whether ``low`` and ``high`` say anything."""
        return self.mode == "clamp"

    @property
    def hidden_size(self) -> int:
        """Width of the site."""
        return int(self.encoder.shape[1])

    def keep_layers(self, layers: tuple[int, ...]) -> "SAESteer":
        """The steer with some of its layers; ``SteerError`` for a layer that it does not have."""
        rows = positions_of(layers, self.layers)
        tensors: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, layers=layers, **tensors)
