"""Random steers of equal norm, as a control for the direction of a steer.

A standard normal sample replaces the steer's tensors and is rescaled to keep these norms (Frobenius
norm of a matrix):

    lm_steer  multiply: W_s = P1_s P2_s^T of each column s    add, offset: the row of each column
    vector    the direction of each layer                     delta: each step and layer
    low_rank  B A of each layer, and its bias                 sae: the decoder's row of each layer

A feature keeps its encoder, so that the control acts on the same tokens.
"""

from dataclasses import replace
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer, LowRankSteer, SAESteer, Steer


def random_steer(steer: Steer, seed: int = 0) -> Steer:
    """A random steer of equal norm, float32; deterministic for a given seed.

    It keeps epsilon, fixed columns, layers, site, mode and schedule of ``steer``. Raises
    ``SteerError`` for a seed below 0 or above 2^63 - 1.
    """
    if not 0 <= seed < 1 << 63:
        raise SteerError(f"control seed is {seed}; expected a number from 0 to 2^63 - 1")
    generator = torch.Generator().manual_seed(seed)
    normal = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in steer.tensors.items()
    }
    fields: dict[str, Any] = {name: t.float() for name, t in _match_norms(normal, steer).items()}
    fields["description"] = f"random control of equal norm, seed {seed}"
    fields["recipe"] = {"method": "random control", "settings": {"seed": seed}}
    return replace(steer, **fields)


def product_norms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``|P1_s P2_s^T|_F`` of each column, float64, from ``[columns, hidden_size, rank]``.

    Computed as ``|P1 P2^T|^2 = sum((P1^T P1) * (P2^T P2))`` with matrices ``[rank, rank]``, so that
    no ``[hidden_size, hidden_size]`` matrix is formed.
    """
    grams = [p.double().transpose(1, 2) @ p.double() for p in (first, second)]
    return (grams[0] * grams[1]).sum((1, 2)).clamp_min(0).sqrt()


def _match_norms(random: dict[str, torch.Tensor], steer: Steer) -> dict[str, torch.Tensor]:
    """Rescale ``random`` to the norms of ``steer``."""
    if isinstance(steer, LMSteer) and steer.projector1 is not None:
        assert steer.projector2 is not None
        target_norms = product_norms(steer.projector1, steer.projector2)
        random_norms = product_norms(random["projector1"], random["projector2"])
        # The square root on each factor keeps both within the range of float32.
        factor = (target_norms / random_norms).sqrt()[:, None, None]
        return {name: tensor * factor for name, tensor in random.items()}
    if isinstance(steer, LowRankSteer):
        first, second = steer.b, steer.a.transpose(1, 2)
        norms = product_norms(random["b"], random["a"].transpose(1, 2))
        factor = (product_norms(first, second) / norms).sqrt()[:, None, None]
        matched = {name: random[name] * factor for name in ("a", "b")}
        if steer.bias is None:
            return matched
        return {**matched, "bias": _match_row_norms(random["bias"], steer.bias)}
    if isinstance(steer, SAESteer):
        return {**steer.tensors, "decoder": _match_row_norms(random["decoder"], steer.decoder)}
    return {name: _match_row_norms(random[name], tensor) for name, tensor in steer.tensors.items()}


def _match_row_norms(random: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Rescale the rows of ``random`` to the norms of the rows of ``tensor``."""
    target_norms = tensor.double().norm(dim=-1, keepdim=True)
    scaled: torch.Tensor = random * target_norms / random.norm(dim=-1, keepdim=True)
    return scaled
