"""Low-rank maps of a layer: LoReFT, linear maps, LM-Steer's transform at an inner layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice, check_default_strength, check_tensor
from vllm_steer.steers.layers import check_layers, positions_of
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankSteer:
    """An affine map of low rank per layer, for every token of a request at strength ``v``.

        h <- h + v * B (A h + b)

    Several steers of one site read the same ``h`` and are summed. LoReFT is ``A = W - R``,
    ``B = R^T`` with its ``b``, at strength 1; LM-Steer's transform is ``A = P1^T``, ``B = P2``,
    at strength epsilon times its own. Products and sums are in float32.

    Shapes: ``a`` ``[len(layers), rank, hidden_size]``, ``b`` ``[len(layers), hidden_size, rank]``,
    ``bias`` ``[len(layers), rank]`` or None; ``layers`` 0-based and ascending. ``recipe`` records
    how the steer was made, in plain JSON values.

    Raises ``SteerError`` for inconsistent sizes, non-finite values or an unknown site.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024
    (arXiv 2404.03592), equation 2; Han et al., "LM-Steer", ACL 2024 (arXiv 2305.12798), section 3.

    >>> import torch
    >>> a, b = torch.ones(2, 4, 8), torch.ones(2, 8, 4)
    >>> steer = LowRankSteer(a=a, b=b, layers=(4, 5))
    >>> steer.rank, steer.hidden_size, steer.keep_layers((5,)).layers
    (4, 8, (5,))
    """

    a: torch.Tensor = field(repr=False)
    b: torch.Tensor = field(repr=False)
    bias: torch.Tensor | None = field(default=None, repr=False)
    layers: tuple[int, ...]
    site: VectorSite = "resid"
    default_strength: float | None = None
    base_model: str = ""
    description: str = ""
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    kind = "low_rank"
    schedule = None
    steps = None

    def __post_init__(self) -> None:
        check_choice("site", self.site, VECTOR_SITES)
        check_default_strength(self.default_strength)
        check_tensor("a", self.a, dims=3)
        check_tensor("b", self.b, dims=3)
        check_layers(self.layers, self.a.shape[0], "a")
        expected: dict[str, tuple[int, ...]] = {"b": (self.a.shape[0], self.hidden_size, self.rank)}
        if self.bias is not None:
            check_tensor("bias", self.bias, dims=2)
            expected["bias"] = (self.a.shape[0], self.rank)
        for name, shape in expected.items():
            if tuple(self.tensors[name].shape) != shape:
                raise SteerError(
                    f"tensor {name} is {list(self.tensors[name].shape)} and a "
                    f"{list(self.a.shape)}; expected {list(shape)} for {name}"
                )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their name in a steer file."""
        tensors = {"a": self.a, "b": self.b}
        return tensors if self.bias is None else {**tensors, "bias": self.bias}

    @property
    def rank(self) -> int:
        """Rank of each layer's map."""
        return int(self.a.shape[1])

    @property
    def hidden_size(self) -> int:
        """Width of the site."""
        return int(self.a.shape[2])

    def keep_layers(self, layers: tuple[int, ...]) -> "LowRankSteer":
        """The steer with some of its layers; ``SteerError`` for a layer that it does not have."""
        rows = positions_of(layers, self.layers)
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, a=self.a[rows], b=self.b[rows], bias=bias, layers=layers)
