"""LM-Steer's loss and gradient against its formula, token by token, in float64."""

from typing import Any

import pytest
import torch

from vllm_steer.fit.head_loss import head_loss
from vllm_steer.fit.objective import TokenBatch, initial_parameters, loss_and_gradients
from vllm_steer.hf.lm_head import LMHead

EPSILON = 0.3
REGULARIZATION = 0.01
HIDDEN, VOCAB, COLUMNS, RANK = 4, 7, 2, 3
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "logit scale": {"scale": 0.6},
    "soft cap": {"soft_cap": 1.5},
    "all three": {"bias": True, "scale": 0.6, "soft_cap": 1.5},
}
VARIANTS = ("multiply", "add", "offset")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_head(bias: bool = False, scale: float = 1.0, soft_cap: float | None = None) -> LMHead:
    return LMHead(
        normal(VOCAB, HIDDEN, seed=1), normal(VOCAB, seed=2) if bias else None, scale, soft_cap
    )


def some_tokens(count: int = 5) -> TokenBatch:
    strengths = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-0.5, 1.0], [-0.5, 1.0], [0.0, 1.0]])
    targets = torch.tensor([3, 6, 0, 2, 6])
    return TokenBatch(normal(count, HIDDEN, seed=3), targets[:count], strengths.double()[:count])


def some_parameters(variant: str, rank: int = RANK) -> dict[str, torch.Tensor]:
    if variant == "multiply":
        shape = (COLUMNS, HIDDEN, rank)
        return {"projector1": normal(*shape, seed=4), "projector2": normal(*shape, seed=5)}
    return {variant: normal(COLUMNS, HIDDEN if variant == "add" else VOCAB, seed=4)}


def loss_by_hand(
    head: LMHead, tokens: TokenBatch, parameters: dict[str, torch.Tensor]
) -> torch.Tensor:
    """One token at a time; for `multiply` the transform as a full matrix, `e' = (1 + eps W) e`."""
    losses = []
    for h, v, target in zip(
        tokens.hidden_states, tokens.strengths, tokens.targets.tolist(), strict=True
    ):
        logits = head.weight @ h
        if "projector1" in parameters:
            w = sum(
                v[s] * parameters["projector1"][s] @ parameters["projector2"][s].T
                for s in range(COLUMNS)
            )
            embeddings = head.weight @ (torch.eye(HIDDEN, dtype=torch.float64) + EPSILON * w).T
            logits = embeddings @ h
        elif "add" in parameters:
            logits = head.weight @ (h + EPSILON * (v @ parameters["add"]))
        if head.bias is not None:
            logits = logits + head.bias
        if "offset" in parameters:
            logits = logits + EPSILON * (v @ parameters["offset"])
        logits = head.scale * logits
        if head.soft_cap:
            logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
        losses.append(torch.logsumexp(logits, 0) - logits[target])
    penalty = sum((p**2).sum() for p in parameters.values())
    return torch.stack(losses).mean() + REGULARIZATION * penalty


def computed_loss(head: LMHead, tokens: TokenBatch, parameters: Any, **options: Any) -> Any:
    return loss_and_gradients(
        head, tokens, parameters, epsilon=EPSILON, regularization=REGULARIZATION, **options
    )


@pytest.mark.parametrize("rank", [2, 40], ids=["low rank", "rank above the hidden size"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_formula(
    variant: str, options: dict[str, Any], rank: int
) -> None:
    head, tokens, parameters = a_head(**options), some_tokens(), some_parameters(variant, rank)
    loss, gradients = computed_loss(head, tokens, parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    expected = loss_by_hand(head, tokens, leaves)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    by_autograd = torch.autograd.grad(expected, list(leaves.values()))
    torch.testing.assert_close(list(gradients.values()), list(by_autograd), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_tokens_give_the_same_loss(variant: str, at_once: int) -> None:
    head, tokens, parameters = a_head(bias=True), some_tokens(), some_parameters(variant)
    loss, gradients = computed_loss(head, tokens, parameters, at_once=at_once)
    expected = loss_by_hand(head, tokens, parameters)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    whole = computed_loss(head, tokens, parameters)[1]
    torch.testing.assert_close(gradients, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_is_enough(variant: str) -> None:
    head, tokens, parameters = a_head(), some_tokens(1), some_parameters(variant)
    expected = loss_by_hand(head, tokens, parameters)
    assert computed_loss(head, tokens, parameters)[0] == pytest.approx(expected.item(), rel=1e-12)


def test_no_more_logits_exist_at_once_than_requested() -> None:
    sizes = []

    class Watched(LMHead):
        def raw_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden_states))
            return super().raw_logits(hidden_states)

    head_loss(
        Watched(normal(VOCAB, HIDDEN, seed=1), None),
        normal(11, HIDDEN, seed=2),
        torch.zeros(11, dtype=torch.int64),
        at_once=4,
    )
    assert sizes == [4, 4, 3]


def test_the_error_of_a_bfloat16_head_is_within_its_rounding() -> None:
    head, tokens, parameters = a_head(), some_tokens(), some_parameters("multiply")
    narrow = LMHead(head.weight.bfloat16(), None)
    exact = LMHead(narrow.weight.double(), None)
    in_float32 = TokenBatch(tokens.hidden_states.float(), tokens.targets, tokens.strengths.float())
    singles = {name: value.float() for name, value in parameters.items()}
    loss, gradients = computed_loss(narrow, in_float32, singles)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    expected = loss_by_hand(exact, tokens, leaves)
    assert loss == pytest.approx(expected.item(), rel=2e-2)
    for gradient, formula_value in zip(
        gradients.values(), torch.autograd.grad(expected, list(leaves.values())), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - formula_value).norm() < 2e-2 * formula_value.norm()


def test_a_likely_and_an_unlikely_token_have_finite_losses() -> None:
    weight = torch.tensor([[200.0], [-200.0]])
    loss = head_loss(LMHead(weight, None), torch.ones(2, 1), torch.tensor([0, 1]))
    assert loss.total.item() == pytest.approx(400.0)
    assert loss.gradient.tolist() == [[0.0], [400.0]]


@pytest.mark.parametrize(
    ("variant", "shape"), [("add", (2, HIDDEN)), ("offset", (2, VOCAB))], ids=["add", "offset"]
)
def test_the_initial_scale_does_not_change_add_and_offset(
    variant: Any, shape: tuple[int, int]
) -> None:
    start = initial_parameters(
        variant,
        columns=2,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        rank=RANK,
        initial_scale=1e-6,
        seed=0,
    )
    assert start[variant].shape == shape
    assert 0.3 < start[variant].std() < 3


def test_projectors_begin_at_the_initial_scale() -> None:
    start = initial_parameters(
        "multiply", columns=2, hidden_size=64, vocab_size=9, rank=50, initial_scale=0.02, seed=0
    )
    for projector in start.values():
        assert projector.shape == (2, 64, 50)
        assert projector.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(start["projector1"], start["projector2"])
