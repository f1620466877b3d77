"""The trainer's loss and gradient against the formula, and what it does with texts and labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_steer import SteerError
from vllm_steer.embedded import MODEL
from vllm_steer.fit import fit_lm_steer
from vllm_steer.fit.lm_steer import Batch, encode, initial_projectors, output_head, steer_loss

EPSILON = 0.3
REGULARIZATION = 0.01
TEXTS = ["The hotel was wonderful.", "The flat was terrible and damp.", "Great!", "Dreadful."]
LABELS = [1.0, -1.0, 0.5, -0.5]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tiny_model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_batch() -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows of three tokens, hidden size 4, rank 2, two columns, seven words; all float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = torch.tensor([[3, 6, 0], [2, -100, -100]])
    strengths = torch.tensor([[1.0, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    return (
        Batch(normal(2, 3, 4), targets, strengths),
        normal(2, 4, 2),
        normal(2, 4, 2),
        normal(7, 4),
    )


def loss_by_hand(
    batch: Batch, projector1: torch.Tensor, projector2: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """One token at a time, the transform as a full matrix."""
    losses = []
    for row, targets in enumerate(batch.targets.tolist()):
        matrix = torch.eye(4, dtype=torch.float64)
        for column in range(2):
            transform = projector1[column] @ projector2[column].T
            matrix = matrix + EPSILON * batch.strengths[row, column] * transform
        for position, target in enumerate(targets):
            if target != -100:
                logits = embeddings @ (batch.hidden_states[row, position] @ matrix)
                losses.append(torch.logsumexp(logits, 0) - logits[target])
    penalty = (projector1**2).sum() + (projector2**2).sum()
    return torch.stack(losses).mean() + REGULARIZATION * penalty


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    batch, projector1, projector2, embeddings = tiny_batch()
    projectors = (projector1.requires_grad_(), projector2.requires_grad_())
    loss = steer_loss(lambda h: h @ embeddings.T, batch, *projectors, EPSILON, REGULARIZATION)
    expected = loss_by_hand(batch, *projectors, embeddings)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, projectors),
        torch.autograd.grad(expected, projectors),
        rtol=1e-10,
        atol=1e-12,
    )


def test_one_step_is_one_step_of_adam(tiny_model: Any, tokenizer: Any) -> None:
    batch = encode(tiny_model, tokenizer, TEXTS[:1], LABELS[:1], max_length=32, dummy=True)
    projectors = [p.requires_grad_() for p in initial_projectors(2, 16, 3, seed=5)]
    loss = steer_loss(output_head(tiny_model), batch, *projectors, EPSILON, REGULARIZATION)
    gradients = torch.autograd.grad(loss, projectors)
    # The first step of Adam is the learning rate times g / (|g| + 1e-8).
    expected = [
        (p - 0.1 * g / (g.abs() + 1e-8)).detach()
        for p, g in zip(projectors, gradients, strict=True)
    ]
    steer = fit_lm_steer(
        tiny_model,
        tokenizer,
        TEXTS[:1],
        LABELS[:1],
        rank=3,
        epsilon=EPSILON,
        steps=1,
        learning_rate=0.1,
        regularization=REGULARIZATION,
        seed=5,
    )
    torch.testing.assert_close([steer.projector1, steer.projector2], expected)


def test_padding_is_masked(tiny_model: Any, tokenizer: Any) -> None:
    batch = encode(tiny_model, tokenizer, TEXTS, LABELS, max_length=32, dummy=True)
    projectors = initial_projectors(2, 16, 3, seed=0)
    head = output_head(tiny_model)
    together = steer_loss(head, batch, *projectors, EPSILON, 0.0)
    alone, tokens = 0.0, 0
    for text, label in zip(TEXTS, LABELS, strict=True):
        single = encode(tiny_model, tokenizer, [text], [label], max_length=32, dummy=True)
        count = single.targets.numel()
        alone += count * steer_loss(head, single, *projectors, EPSILON, 0.0).item()
        tokens += count
    assert together.item() == pytest.approx(alone / tokens, rel=1e-5)


def test_padding_is_trained_on_when_asked_for(tiny_model: Any, tokenizer: Any) -> None:
    batch = encode(
        tiny_model, tokenizer, TEXTS, LABELS, max_length=32, dummy=True, mask_padding=False
    )
    assert (batch.targets == tokenizer.pad_token_id).any()
    assert (batch.targets != -100).all()


def test_dummy_column_is_one_for_every_label(tiny_model: Any, tokenizer: Any) -> None:
    batch = encode(tiny_model, tokenizer, TEXTS, LABELS, max_length=32, dummy=True)
    assert batch.strengths.tolist() == [[1.0, 1.0], [-1.0, 1.0], [0.5, 1.0], [-0.5, 1.0]]


@pytest.mark.parametrize(("dummy", "fixed"), [(True, (1,)), (False, ())])
def test_dummy_column_is_fixed_in_the_steer(
    tiny_model: Any, tokenizer: Any, dummy: bool, fixed: tuple[int, ...]
) -> None:
    steer = fit_lm_steer(tiny_model, tokenizer, TEXTS, LABELS, rank=2, steps=1, dummy=dummy)
    assert steer.fixed_columns == fixed
    assert steer.columns == len(fixed) + 1


def test_same_seed_gives_the_same_steer(tiny_model: Any, tokenizer: Any) -> None:
    first, second, other = (
        fit_lm_steer(tiny_model, tokenizer, TEXTS, LABELS, rank=2, steps=3, batch_size=2, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.projector1, second.projector1)
    assert torch.equal(first.projector2, second.projector2)
    assert not torch.equal(first.projector1, other.projector1)


def test_loss_falls_and_the_model_is_left_alone(tiny_model: Any, tokenizer: Any) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    losses: list[float] = []
    fit_lm_steer(
        tiny_model,
        tokenizer,
        TEXTS,
        LABELS,
        rank=8,
        epsilon=1.0,
        steps=40,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_head_applies_bias_scale_and_soft_cap() -> None:
    lm_head = torch.nn.Linear(4, 7)
    model = SimpleNamespace(
        get_output_embeddings=lambda: lm_head,
        config=SimpleNamespace(logit_scale=2.0, final_logit_softcapping=1.5),
    )
    hidden_states = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    plain = 2.0 * (hidden_states @ lm_head.weight.T + lm_head.bias)
    torch.testing.assert_close(output_head(model)(hidden_states), 1.5 * torch.tanh(plain / 1.5))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([], [], "0 texts and 0 labels"),
        (["a"], [1.0, 1.0], "1 texts and 2 labels"),
        (["a"], [5.0], r"label 5.0; labels lie in \[-1, 1\]"),
    ],
    ids=["no texts", "a label too many", "label out of range"],
)
def test_wrong_labels_are_refused(
    tiny_model: Any, tokenizer: Any, texts: list[str], labels: list[float], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        fit_lm_steer(tiny_model, tokenizer, texts, labels)
