"""The singular values of an LM-Steer's matrix, from its factors.

    W = P1 P2^T = Q1 (R1 R2^T) Q2^T,  R1 R2^T = U' diag(s) V'^T,  U = Q1 U',  V = Q2 V'

with ``P1 = Q1 R1`` and ``P2 = Q2 R2``: the small matrix ``R1 R2^T`` has the singular values of
``W``, so ``W`` itself is not formed.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 5, which calls it a PCA; nothing is centred.
"""

from dataclasses import dataclass, field

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition of one column's ``W [hidden_size, hidden_size]``.

    ``values [k]`` descend, ``k = min(hidden_size, rank)``; ``left [hidden_size, k]``, ``right [k,
    hidden_size]``; all float64. A row of ``right`` is a direction in the space of the output
    embeddings: it changes a hidden state ``h`` by ``epsilon v (h . left_i) values_i`` times itself.
    Its sign is arbitrary.
    """

    values: torch.Tensor = field(repr=False)
    left: torch.Tensor = field(repr=False)
    right: torch.Tensor = field(repr=False)

    @property
    def norm(self) -> float:
        """``|W|_F``, the Frobenius norm."""
        return float(self.values.norm())

    @property
    def shares(self) -> torch.Tensor:
        """``s_i^2 / |W|_F^2 [k]``, the share of each direction in ``W``; 0 if ``W`` is zero."""
        squares = self.values.square()
        return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def spectrum(steer: LMSteer, column: int) -> Spectrum:
    """The spectrum of one column of an LM-Steer. Raises ``SteerError`` for a variant without a
    matrix.
    """
    if steer.projector1 is None or steer.projector2 is None:
        raise SteerError(
            f"variant {steer.variant} has no matrix to decompose; only multiply has one"
        )
    first, first_triangle = torch.linalg.qr(steer.projector1[column].double())
    second, second_triangle = torch.linalg.qr(steer.projector2[column].double())
    left, values, right = torch.linalg.svd(first_triangle @ second_triangle.T, full_matrices=False)
    return Spectrum(values, first @ left, right @ second.T)
