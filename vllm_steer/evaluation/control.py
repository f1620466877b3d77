"""A random steer of the same norm as another: the control for a steer's direction.

Normal random numbers take the place of the steer's, and are scaled so that what follows keeps its
norm (Frobenius for a matrix):

    lm_steer  multiply: W_s = P1_s P2_s^T of each column s    add, offset: the row of each column
    vector    the direction of each layer                     delta: of each step and layer
"""

from dataclasses import replace
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer, Steer


def random_steer(steer: Steer, seed: int = 0) -> Steer:
    """The random steer of equal norm, float32; the same for the same seed.

    All else is the steer's own: epsilon, fixed columns, layers, site, mode, schedule. Raises
    ``SteerError`` for a seed that is negative or too large.
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

    ``|P1 P2^T|^2 = sum((P1^T P1) * (P2^T P2))``: two matrices of ``rank x rank``, never one of
    ``hidden_size x hidden_size``.
    """
    grams = [p.double().transpose(1, 2) @ p.double() for p in (first, second)]
    return (grams[0] * grams[1]).sum((1, 2)).clamp_min(0).sqrt()


def _match_norms(random: dict[str, torch.Tensor], steer: Steer) -> dict[str, torch.Tensor]:
    if isinstance(steer, LMSteer) and steer.projector1 is not None:
        assert steer.projector2 is not None
        target_norms = product_norms(steer.projector1, steer.projector2)
        random_norms = product_norms(random["projector1"], random["projector2"])
        # Half of the scale on each factor: both keep a size that float32 holds well.
        factor = (target_norms / random_norms).sqrt()[:, None, None]
        return {name: tensor * factor for name, tensor in random.items()}
    return {name: _match_row_norms(random[name], tensor) for name, tensor in steer.tensors.items()}


def _match_row_norms(random: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of the norms of ``tensor``'s rows."""
    target_norms = tensor.double().norm(dim=-1, keepdim=True)
    scaled: torch.Tensor = random * target_norms / random.norm(dim=-1, keepdim=True)
    return scaled
