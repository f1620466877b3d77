"""Singular values from the factors, compared with the decomposition of the full matrix."""

import pytest
import torch

from vllm_steer import LMSteer, SteerError
from vllm_steer.inspection import spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def steer_of(rank: int, hidden_size: int = 12, columns: int = 2) -> LMSteer:
    return LMSteer(
        variant="multiply",
        epsilon=0.5,
        hidden_size=hidden_size,
        fixed_columns=(1,),
        projector1=normal(columns, hidden_size, rank, seed=1),
        projector2=normal(columns, hidden_size, rank, seed=2),
    )


@pytest.mark.parametrize("rank", [1, 5, 12, 30], ids=lambda rank: f"rank {rank}")
def test_singular_values_are_those_of_the_whole_matrix(rank: int) -> None:
    steer = steer_of(rank)
    whole = steer.projector1[0] @ steer.projector2[0].T
    expected = torch.linalg.svdvals(whole)
    decomposition = spectrum(steer, 0)
    rank_k = min(rank, 12)
    torch.testing.assert_close(decomposition.values, expected[:rank_k], rtol=1e-10, atol=1e-12)
    assert expected[rank_k:].sum() < 1e-10
    assert decomposition.norm == pytest.approx(whole.norm().item(), rel=1e-12)


@pytest.mark.parametrize("rank", [5, 30], ids=lambda rank: f"rank {rank}")
def test_singular_vectors_are_those_of_the_whole_matrix_up_to_sign(rank: int) -> None:
    # Trap: W = P1 P2^T acts on the right of h, so the output embeddings meet its RIGHT vectors.
    steer = steer_of(rank)
    left_vectors, _, right = torch.linalg.svd(steer.projector1[0] @ steer.projector2[0].T)
    decomposition = spectrum(steer, 0)
    for i in range(min(rank, 12)):
        sign = torch.sign(decomposition.right[i] @ right[i])
        torch.testing.assert_close(decomposition.right[i] * sign, right[i], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            decomposition.left[:, i] * sign, left_vectors[:, i], rtol=1e-7, atol=1e-9
        )
    rebuilt = decomposition.left @ torch.diag(decomposition.values) @ decomposition.right
    torch.testing.assert_close(rebuilt, steer.projector1[0] @ steer.projector2[0].T)


def test_each_column_has_a_spectrum_of_its_own() -> None:
    steer = steer_of(3)
    whole = steer.projector1[1] @ steer.projector2[1].T
    torch.testing.assert_close(spectrum(steer, 1).values, torch.linalg.svdvals(whole)[:3])


def test_shares_are_of_the_sum_of_squares() -> None:
    steer = LMSteer(
        variant="multiply",
        epsilon=1.0,
        hidden_size=3,
        projector1=torch.diag(torch.tensor([3.0, 4.0, 0.0]))[None],
        projector2=torch.eye(3)[None],
    )
    decomposition = spectrum(steer, 0)
    assert decomposition.values.tolist() == pytest.approx([4, 3, 0])
    assert decomposition.shares.tolist() == pytest.approx([16 / 25, 9 / 25, 0])


def test_a_zero_column_has_shares_of_zero() -> None:
    zero = torch.zeros(1, 4, 2)
    steer = LMSteer(
        variant="multiply", epsilon=1.0, hidden_size=4, projector1=zero, projector2=zero
    )
    assert spectrum(steer, 0).shares.tolist() == [0, 0]


def test_a_variant_without_a_matrix_is_refused() -> None:
    steer = LMSteer(variant="add", epsilon=1.0, hidden_size=4, add=torch.ones(1, 4))
    with pytest.raises(SteerError, match="variant add has no matrix to decompose; only multiply"):
        spectrum(steer, 0)
