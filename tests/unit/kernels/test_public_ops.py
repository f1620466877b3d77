"""``lm_steer`` and ``steer_tokens``: plain tensors in, against the equations written out here."""

import doctest

import pytest
import torch

from vllm_steer.kernels.guidance import ops as guidance_ops
from vllm_steer.kernels.guidance import steer_tokens
from vllm_steer.kernels.lm_steer import lm_steer
from vllm_steer.kernels.lm_steer import ops as lm_steer_ops

BACKENDS = ["auto", "torch", "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lm_steer_is_the_papers_equation_for_each_row(backend: str, dtype: torch.dtype) -> None:
    width, ranks = 24, (1, 5, 17)
    x = normal(9, 2 * width, dtype=dtype)[:, ::2]  # strided
    first = [normal(width, rank, seed=rank, dtype=dtype) for rank in ranks]
    second = [normal(width, rank, seed=rank + 50, dtype=dtype) for rank in ranks]
    steers = torch.tensor([[-1, -1], [0, -1], [2, 0], [1, 2], [-1, 1], *[[0, 1]] * 4])
    scales = normal(9, 2, seed=9) * 0.1
    expected = x.double().clone()
    for row in range(9):
        for steer, scale in zip(steers[row].tolist(), scales[row].tolist(), strict=True):
            if steer >= 0:
                inner = x[row].double() @ first[steer].double()
                expected[row] += scale * inner @ second[steer].double().T
    out = lm_steer(x, first, second, steers, scales, backend=backend)
    assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(out[0], x[0])
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steer_tokens_adds_to_or_rotates_each_token(backend: str, rotate: bool) -> None:
    width = 24
    hidden, residual = normal(7, width, seed=3), normal(7, width, seed=4)
    vectors = torch.nn.functional.normalize(normal(3, width, seed=5))
    direction_rows = torch.tensor([[-1, -1], [0, -1], [2, 0], [1, 2], [-1, 1], [0, 1], [1, 1]])
    strengths = normal(7, 2, seed=6) * 3
    out = steer_tokens(
        hidden,
        vectors,
        direction_rows,
        strengths,
        rotate=rotate,
        residual=residual,
        backend=backend,
    )
    x = (hidden + residual).double()
    change = torch.zeros_like(x)
    for token in range(7):
        for direction, strength in zip(
            direction_rows[token].tolist(), strengths[token].tolist(), strict=True
        ):
            if direction >= 0:
                change[token] += strength * vectors[direction].double()
    steered = x + change
    if rotate:
        steered *= x.norm(dim=1, keepdim=True) / steered.norm(dim=1, keepdim=True)
    assert torch.equal(out[0], hidden[0])
    torch.testing.assert_close(out.double() + residual.double(), steered, rtol=1e-5, atol=1e-5)


def test_only_the_directions_that_rotate_keep_the_norm() -> None:
    hidden = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    out = steer_tokens(
        hidden,
        torch.eye(2),
        torch.tensor([0, 1]),
        torch.tensor([1.0, -4.0]),
        rotate=torch.tensor([False, True]),
    )
    assert out.tolist() == [[4.0, 4.0], [5.0, 0.0]]


def test_inputs_are_unchanged_and_an_empty_batch_is_allowed() -> None:
    x, hidden = normal(2, 4), normal(2, 4)
    before = x.clone(), hidden.clone()
    steer, scale = torch.tensor([0, 0]), torch.ones(2)
    lm_steer(x, normal(1, 4, 2), normal(1, 4, 2), steer, scale)
    steer_tokens(hidden, normal(1, 4), steer, scale)
    assert torch.equal(x, before[0]) and torch.equal(hidden, before[1])
    none = torch.empty(0, dtype=torch.int64)
    assert lm_steer(x[:0], normal(1, 4, 2), normal(1, 4, 2), none, none.float()).shape == (0, 4)
    assert steer_tokens(x[:0], normal(1, 4), none, none.float()).shape == (0, 4)
    assert torch.equal(lm_steer(x, [], [], torch.tensor([-1, -1]), scale), x)


def test_shapes_and_indices_that_do_not_fit_are_refused() -> None:
    x, one, scale = normal(2, 4), normal(1, 4, 2), torch.ones(2)
    with pytest.raises(
        ValueError, match=r"steer_of_row has values from 0 to 1; expected -1 \(none"
    ):
        lm_steer(x, one, one, torch.tensor([0, 1]), scale)
    with pytest.raises(ValueError, match=r"names a steer twice"):
        lm_steer(x, one, one, torch.tensor([[0, 0], [0, -1]]), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"expected \[4, rank\] twice"):
        lm_steer(x, normal(1, 3, 2), normal(1, 3, 2), torch.tensor([0, 0]), scale)
    with pytest.raises(ValueError, match=r"expected \[2\] or \[2, K\] for both"):
        lm_steer(x, one, one, torch.tensor([0, 0, 0]), torch.ones(3))
    with pytest.raises(ValueError, match=r"direction_of_token has values from -2 to 0"):
        steer_tokens(x, normal(1, 4), torch.tensor([0, -2]), scale)
    with pytest.raises(ValueError, match=r"expected \[directions, 4\]"):
        steer_tokens(x, normal(1, 3), torch.tensor([0, 0]), scale)
    with pytest.raises(ValueError, match="expected integers"):
        lm_steer(x, one, one, scale, scale)
    with pytest.raises(ValueError, match="expected integers"):
        steer_tokens(x, normal(1, 4), scale, scale)
    with pytest.raises(ValueError, match=r"expected \[2\] or \[2, K\] for both"):
        steer_tokens(x, normal(1, 4), torch.zeros(2, 1, 1).long(), torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match=r"kernels is fast; expected|kernels is 'fast'; expected"):
        steer_tokens(x, normal(1, 4), torch.tensor([0, 0]), scale, backend="fast")


@pytest.mark.parametrize("module", [lm_steer_ops, guidance_ops])
def test_the_examples_of_the_docstrings_hold(module: object) -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 4 and results.failed == 0
