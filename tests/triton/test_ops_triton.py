"""``lm_steer`` and ``steer_tokens`` with Triton, against the reference in float64."""

import pytest
import torch

from vllm_steer.kernels.guidance import steer_tokens
from vllm_steer.kernels.lm_steer import lm_steer


def normal(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("max_rows", [None, 64], ids=["row by row", "in tiles"])
def test_lm_steer(max_rows: int | None, device: torch.device) -> None:
    x = normal(5, 70, seed=1, device=device)[:, ::2]
    first, second = (
        [normal(35, rank, seed=seed + rank, device=device) for rank in (3, 20)] for seed in (0, 50)
    )
    steers, scales = torch.tensor([[-1, -1], [0, 1], [1, -1], [0, -1], [1, 0]]), torch.ones(5, 2)
    out = lm_steer(x, first, second, steers, scales, backend="triton", max_rows=max_rows)
    expected = lm_steer(x, first, second, steers, scales, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(out[0], x[0])


@pytest.mark.parametrize("rotate", [False, True])
def test_steer_tokens(rotate: bool, device: torch.device) -> None:
    hidden, residual = (normal(4, 35, seed=seed, device=device) for seed in (1, 2))
    vectors = torch.nn.functional.normalize(normal(3, 35, seed=3, device=device))
    direction_rows, strength = (
        torch.tensor([[-1, -1], [0, 1], [2, -1], [1, 0]]),
        torch.full((4, 2), 1.5),
    )
    out, expected = (
        steer_tokens(
            hidden,
            vectors,
            direction_rows,
            strength,
            rotate=rotate,
            residual=residual,
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[0], hidden[0])
