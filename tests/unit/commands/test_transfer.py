"""Transfer, compared with explicit matrices; solvers, with naive implementations in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_steer import LMSteer, SteerError, VectorSteer
from vllm_steer.steers import DeltaSteer
from vllm_steer.transfer import (
    embedding_map,
    fit_matrix,
    map_columns,
    shared_vocabulary,
    transfer_steer,
)

FROM, TO, SHARED = 5, 7, 40


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tokenizer(numbers: dict[str, int]) -> Any:
    return SimpleNamespace(get_vocab=lambda: numbers)


def words(count: int, *, first: int = 0) -> dict[str, int]:
    return {f"w{i}": i - first for i in range(first, first + count)}


def multiply(**fields: Any) -> LMSteer:
    return LMSteer(
        variant="multiply",
        epsilon=0.3,
        hidden_size=FROM,
        projector1=normal(2, FROM, 3, seed=1),
        projector2=normal(2, FROM, 3, seed=2),
        **fields,
    )


def test_shared_tokens_are_sorted_by_their_number_in_the_source() -> None:
    # Trap: a fast tokenizer's table is in the order of a hash map, and "the first" are taken of it.
    source = tokenizer({"c": 2, "only": 3, "a": 9, "b": 0})
    target = tokenizer({"b": 5, "a": 1, "c": 7, "other": 0})
    shared = shared_vocabulary(source, target, source_rows=10, target_rows=10)
    assert shared.tokens == ("b", "c", "a")
    assert shared.source_ids.tolist() == [0, 2, 9]
    assert shared.target_ids.tolist() == [5, 7, 1]


def test_tokens_without_a_row_are_not_shared() -> None:
    source, target = tokenizer({"a": 0, "b": 1, "c": 2}), tokenizer({"a": 0, "b": 5, "c": 1})
    shared = shared_vocabulary(source, target, source_rows=2, target_rows=5)
    assert shared.tokens == ("a",)


def test_mapped_transform_is_b_w_b_transposed() -> None:
    # Trap: H = B^T and not its inverse; B is not orthogonal here, so the two differ.
    steer, matrix = multiply(fixed_columns=(1,)), normal(TO, FROM, seed=3)
    moved = map_columns(steer, matrix)
    for column in range(2):
        w = steer.projector1[column] @ steer.projector2[column].T
        expected = torch.zeros(TO, TO, dtype=torch.float64)
        for i in range(TO):
            for j in range(TO):
                expected[i, j] = matrix[i] @ w @ matrix[j]
        transferred = moved.projector1[column] @ moved.projector2[column].T
        torch.testing.assert_close(transferred, expected, rtol=1e-12, atol=1e-12)
    assert (moved.hidden_size, moved.fixed_columns, moved.epsilon) == (TO, (1,), 0.3)


def test_an_added_column_changes_shared_logits_as_in_the_source() -> None:
    # Where E_to B = E_from exactly, A' e' = A e for every token.
    target_rows, matrix = normal(SHARED, TO, seed=4), normal(TO, FROM, seed=3)
    steer = LMSteer(variant="add", epsilon=0.3, hidden_size=FROM, add=normal(2, FROM, seed=5))
    moved = map_columns(steer, matrix)
    changes = moved.add @ target_rows.T
    torch.testing.assert_close(changes, steer.add @ (target_rows @ matrix).T)
    assert moved.add.shape == (2, TO)


def test_an_offset_is_mapped_by_token_with_the_mean_for_missing_tokens() -> None:
    steer = LMSteer(
        variant="offset",
        epsilon=0.3,
        hidden_size=FROM,
        offset=torch.tensor([[1.0, 2.0, 6.0, 50.0]]),
    )
    source = torch.zeros(4, FROM), tokenizer({"a": 0, "b": 1, "c": 2, "only": 3})
    target = torch.zeros(5, TO), tokenizer({"c": 0, "new": 1, "a": 2, "b": 3, "other": 4})
    matrix = transfer_steer(steer, source, target)
    assert matrix.steer.offset.tolist() == [[6, 3, 1, 2, 3]]
    assert (matrix.steer.hidden_size, len(matrix.shared), matrix.fit) == (TO, 3, None)


def test_least_squares_solves_the_normal_equations() -> None:
    target, source = normal(SHARED, TO, seed=4), normal(SHARED, FROM, seed=5)
    expected = torch.linalg.inv(target.T @ target) @ target.T @ source
    matrix = fit_matrix(target, source, solver="least-squares")
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("to", [7, 3], ids=["wider", "narrower"])
def test_orthogonal_finds_a_rotation_despite_shift_and_scale(to: int) -> None:
    if to > FROM:
        rotation = torch.linalg.qr(normal(to, FROM, seed=6)).Q
        source = normal(SHARED, FROM, seed=5)
        target = source @ rotation.T
    else:
        rotation = torch.linalg.qr(normal(FROM, to, seed=6)).Q.T
        target = normal(SHARED, to, seed=5)
        source = target @ rotation
    matrix = fit_matrix(3.0 * target + 1.0, source, solver="orthogonal")
    torch.testing.assert_close(matrix, rotation, rtol=1e-9, atol=1e-9)


def test_orthogonal_is_the_best_of_all_with_orthonormal_columns() -> None:
    target, source = normal(SHARED, TO, seed=4), normal(SHARED, FROM, seed=5)
    matrix = fit_matrix(target, source, solver="orthogonal")
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(FROM, dtype=torch.float64))
    rows = [e - e.mean(0) for e in (target, source)]
    rows = [e / e.norm(dim=1, keepdim=True) for e in rows]
    cosines = (rows[0] @ matrix * rows[1]).sum()
    # The columns are orthonormal, so this is as well the shortest way back to the target.
    error = (rows[1] @ matrix.T - rows[0]).norm()
    for seed in range(50):
        near = torch.linalg.qr(matrix + 0.05 * normal(TO, FROM, seed=seed)).Q
        near = near * torch.sign((near * matrix).sum(0))
        assert (rows[0] @ near * rows[1]).sum() < cosines
        assert (rows[1] @ near.T - rows[0]).norm() > error


def test_authors_solver_is_adam_on_both_mean_squared_errors() -> None:
    # They train a forward map in the same objective; it must not change the backward one.
    target, source = normal(SHARED, TO, seed=4), normal(SHARED, FROM, seed=5)
    forward, backward = normal(FROM, TO, seed=7), normal(TO, FROM, seed=8)
    start = backward.clone()
    forward.requires_grad_()
    backward.requires_grad_()
    optimizer = torch.optim.Adam([forward, backward], lr=0.01)
    for _ in range(25):
        loss = torch.nn.functional.mse_loss(source @ forward, target)
        loss = loss + torch.nn.functional.mse_loss(target @ backward, source)
        gradients = torch.autograd.grad(loss, (forward, backward))
        forward.grad, backward.grad = gradients
        optimizer.step()
    matrix = embedding_map.authors(target, source, start, steps=25, on_step=lambda _: None)
    torch.testing.assert_close(matrix, backward.detach(), rtol=1e-9, atol=1e-11)
    assert (matrix - start).abs().max() > 0.1


def test_authors_solver_takes_the_first_4000_rows_and_norms_each_row_of_b(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Trap: the rows of B are normed, not its columns, so the fitted scale is lost.
    target, source = normal(4100, TO, seed=4), normal(4100, FROM, seed=5)
    value = {}

    def solve(target: Any, source: Any, start: Any, *, steps: int, on_step: Any) -> Any:
        value.update(rows=(len(target), len(source)), steps=steps, first=target[0])
        return 5.0 * start

    monkeypatch.setattr(embedding_map, "authors", solve)
    matrix = fit_matrix(target, source, solver="authors", seed=3)
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(TO, dtype=torch.float64))
    assert not torch.allclose(matrix.norm(dim=0), torch.ones(FROM, dtype=torch.float64))
    assert (value["rows"], value["steps"]) == ((4000, 4000), 5000)
    assert torch.equal(value["first"], target[0])


def test_authors_solver_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_map, "AUTHORS_STEPS", 2)
    rows = normal(SHARED, TO, seed=4), normal(SHARED, FROM, seed=5)
    first, again, other = (fit_matrix(*rows, solver="authors", seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def models(matrix: torch.Tensor | None = None) -> tuple[Any, Any]:
    """Embedding and tokenizer of source and target, with tokens 0 to 39 and 10 to 49."""
    target_rows = normal(SHARED, TO, seed=4)
    source_rows = normal(SHARED, FROM, seed=5)
    if matrix is not None:
        source_rows[10:] = target_rows[:30] @ matrix
    return (source_rows, tokenizer(words(40))), (target_rows, tokenizer(words(40, first=10)))


def test_an_exact_map_is_found_over_shared_tokens_alone() -> None:
    matrix = normal(TO, FROM, seed=3)
    transferred = transfer_steer(multiply(), *models(matrix), solver="least-squares")
    assert len(transferred.shared) == 30
    torch.testing.assert_close(transferred.matrix, matrix, rtol=1e-9, atol=1e-9)
    assert transferred.fit.relative_residual < 1e-9
    assert transferred.fit.mean_cosine == pytest.approx(1)


def test_fit_error_is_of_rows_less_their_mean_at_the_best_scale() -> None:
    source, target = models()
    matrix = transfer_steer(multiply(), source, target, solver="orthogonal")
    mapped = (target[0][:30] @ matrix.matrix).numpy()
    expected = source[0][10:].numpy()
    mapped, expected = mapped - mapped.mean(0), expected - expected.mean(0)
    residuals = [((c * mapped - expected) ** 2).sum() for c in torch.linspace(-2, 2, 4001).tolist()]
    assert matrix.fit.relative_residual == pytest.approx(
        (min(residuals) / (expected**2).sum()) ** 0.5, rel=1e-5
    )
    norms = ((mapped**2).sum(1) * (expected**2).sum(1)) ** 0.5
    assert matrix.fit.mean_cosine == pytest.approx(((mapped * expected).sum(1) / norms).mean())


def test_dtype_and_description_carry_over() -> None:
    steer = LMSteer(
        variant="add",
        epsilon=0.3,
        hidden_size=FROM,
        add=torch.ones(1, FROM, dtype=torch.bfloat16),
        default_strength=4.0,
        description="kind",
    )
    moved = transfer_steer(steer, *models()).steer
    assert (moved.add.dtype, moved.default_strength, moved.description) == (
        torch.bfloat16,
        4.0,
        "kind",
    )


@pytest.mark.parametrize(
    "steer",
    [
        VectorSteer(vectors=torch.ones(1, FROM), layers=(0,)),
        DeltaSteer(delta=torch.ones(1, 1, FROM), layers=(0,)),
    ],
    ids=["vector", "delta"],
)
def test_another_kind_is_refused(steer: Any) -> None:
    with pytest.raises(SteerError, match=f"of kind {steer.kind}; only an LM-Steer can be transf"):
        transfer_steer(steer, *models())


def test_a_steer_of_another_model_is_refused() -> None:
    steer = LMSteer(
        variant="add", epsilon=1.0, hidden_size=9, add=torch.ones(1, 9), base_model="gpt2"
    )
    message = r"the steer has width 9 and the source model 5; give the model .* fitted to \(gpt2\)"
    with pytest.raises(SteerError, match=message):
        transfer_steer(steer, *models())


def test_vocabularies_without_a_common_token_are_refused() -> None:
    source, target = models()
    strangers = target[0], tokenizer({f"x{i}": i for i in range(40)})
    with pytest.raises(SteerError, match="the two vocabularies share no token"):
        transfer_steer(multiply(), source, strangers)


def test_too_few_common_tokens_are_refused() -> None:
    source, target = models()
    few_tokens = target[0], tokenizer(words(6))
    with pytest.raises(SteerError, match="share 6 tokens; fitting the map needs at least 7"):
        transfer_steer(multiply(), source, few_tokens)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(SteerError, match="solver is 'magic'; allowed: orthogonal, least-sq"):
        transfer_steer(multiply(), *models(), solver="magic")  # type: ignore[arg-type]
