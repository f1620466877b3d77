"""Parameterizations of a low-rank map ``h + B (A h + b)`` that is trained.

| name         | map                         | ``A``     | ``B``    | ``b`` |
|--------------|-----------------------------|-----------|----------|-------|
| ``loreft``   | ``h + R^T (W h + b - R h)`` | ``W - R`` | ``R^T``  | yes   |
| ``direft``   | ``h + W2^T (W1 h + b)``     | ``W1``    | ``W2^T`` | yes   |
| ``lm-steer`` | ``h + P2 P1^T h``           | ``P1^T``  | ``P2``   | no    |

``R [rank, width]`` has orthonormal rows, at every step: ``R^T`` is the Q factor of the QR
decomposition of the parameter ``rotation``, transposed, with the signs that make the diagonal of
the other factor positive. The parameter ``weight`` is ``W``, ``W1`` or ``P1^T``, and ``up`` is
``W2`` or ``P2^T``; all are ``[layers, rank, width]``, and ``bias`` is ``[layers, rank]``.

A map starts as the identity: ``rotation`` and ``up`` are random orthonormal rows, ``W = R``, the
others are 0.

Source: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024
(arXiv 2404.03592), equation 2 (LoReFT) and equation 3 (DiReFT); Han et al., "LM-Steer", ACL 2024
(arXiv 2305.12798), section 3, its transform with ``epsilon`` 1.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch

Parameterization = Literal["loreft", "direft", "lm-steer"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
Parameters = Mapping[str, torch.Tensor]


class Factors(NamedTuple):
    """The map of each layer: ``a [layers, rank, width]``, ``b [layers, width, rank]`` and ``bias``
    ``[layers, rank]`` or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None


def initial_parameters(
    parameterization: Parameterization, *, layers: int, width: int, rank: int, seed: int
) -> dict[str, torch.Tensor]:
    """The parameters of the identity by name, float32, see the module."""
    generator = torch.Generator().manual_seed(seed)
    rows = orthonormal_rows(torch.randn(layers, rank, width, generator=generator))
    bias = torch.zeros(layers, rank)
    match parameterization:
        case "loreft":
            return {"rotation": rows, "weight": rows.clone(), "bias": bias}
        case "direft":
            return {"up": rows, "weight": torch.zeros_like(rows), "bias": bias}
        case "lm-steer":
            return {"up": rows, "weight": torch.zeros_like(rows)}


def factors(parameters: Parameters) -> Factors:
    """The map that the parameters make; differentiable."""
    weight, bias = parameters["weight"], parameters.get("bias")
    if "rotation" not in parameters:
        return Factors(weight, parameters["up"].mT, bias)
    rotation = orthonormal_rows(parameters["rotation"])
    return Factors(weight - rotation, rotation.mT, bias)


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of length 1 at right angles that span those of ``[..., rank, width]``, of full rank."""
    q, r = torch.linalg.qr(matrix.mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    rows: torch.Tensor = (q * signs[..., None, :]).mT
    return rows
