"""The Hugging Face reference against the head's equation, written out on the last hidden state."""

from typing import Any

import pytest
import torch
import transformers

from vllm_steer import LMSteer, SteerError, hf

VOCAB = 29
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().double().eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def steers() -> dict[str, LMSteer]:
    return {
        "free": LMSteer(
            variant="multiply",
            projector1=normal(1, 8, 3),
            projector2=normal(1, 8, 3) + 1,
            epsilon=0.3,
            hidden_size=8,
        ),
        "dummy": LMSteer(
            variant="multiply",
            projector1=normal(2, 8, 2).double(),
            projector2=normal(2, 8, 2).double() - 1,
            epsilon=0.2,
            hidden_size=8,
            fixed_columns=(1,),
        ),
        "vector": LMSteer(
            variant="add", add=normal(2, 8), epsilon=0.7, hidden_size=8, fixed_columns=(0,)
        ),
        "tilt": LMSteer(
            variant="offset",
            offset=normal(2, VOCAB),
            epsilon=0.9,
            hidden_size=8,
            fixed_columns=(0,),
        ),
    }


def by_hand(model: Any, strengths: dict[str, float]) -> torch.Tensor:
    """Logits from the last hidden state with explicit matrices ``W = sum_s a_s P1_s P2_s^T``."""
    c = model.base_model(TOKENS).last_hidden_state
    steered, offset = c.clone(), torch.zeros(VOCAB, dtype=torch.float64)
    for name, v in strengths.items():
        steer = steers()[name]
        if v == 0:
            continue
        for column in range(steer.columns):
            a = 1.0 if column in steer.fixed_columns else v
            if name in ("free", "dummy"):
                w = steer.projector1[column].double() @ steer.projector2[column].double().T
                steered = steered + steer.epsilon * a * (c @ w)
            elif name == "vector":
                steered = steered + steer.epsilon * a * steer.add[column].double()
            else:
                offset = offset + steer.epsilon * a * steer.offset[column].double()
    return steered @ model.lm_head.weight.T + offset


MIXES: list[dict[str, float]] = [
    {"free": 2.0},
    {"free": -0.25},
    {"dummy": 3.0},
    {"vector": 1.5},
    {"tilt": -2.0},
    {"free": 1.0, "dummy": -1.0, "vector": 2.0, "tilt": 0.5},
    {"free": 1.0, "dummy": 0.0},
]


@pytest.mark.parametrize("strengths", MIXES, ids=str)
@torch.no_grad()
def test_steered_logits_are_those_computed_by_hand(model: Any, strengths: dict[str, float]) -> None:
    expected = by_hand(model, strengths)
    with hf.steered(model, strengths, steers()) as same:
        assert same is model
        result = model(TOKENS).logits
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, model(TOKENS).logits)


@pytest.mark.parametrize("strengths", [{}, {"free": 0.0}, {n: -0.0 for n in steers()}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_strength_zero_leaves_every_bit(
    model: Any, strengths: dict[str, float], dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    expected = model(TOKENS).logits
    with hf.steered(model, strengths, steers()):
        assert torch.equal(model(TOKENS).logits, expected)


@torch.no_grad()
def test_no_hook_stays_on_the_model(model: Any) -> None:
    before = model(TOKENS).logits
    with hf.steered(model, {"free": 2.0, "tilt": 1.0}, steers()):
        assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS).logits, before)


@torch.no_grad()
def test_no_hook_stays_on_the_model_after_an_error(model: Any) -> None:
    before = model(TOKENS).logits
    with pytest.raises(KeyError), hf.steered(model, {"free": 2.0, "tilt": 1.0}, steers()):
        raise KeyError
    assert torch.equal(model(TOKENS).logits, before)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


@torch.no_grad()
def test_nested_steers_add_up(model: Any) -> None:
    expected = by_hand(model, {"vector": 2.0, "tilt": 1.0})
    with hf.steered(model, {"vector": 2.0}, steers()), hf.steered(model, {"tilt": 1.0}, steers()):
        result = model(TOKENS).logits
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_generate_is_steered_at_every_step(model: Any) -> None:
    strengths = {"free": 2.0, "tilt": 3.0}
    expected = TOKENS.clone()
    with hf.steered(model, strengths, steers()):
        result = model.generate(
            TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
        for _ in range(5):
            logits = model(expected).logits[:, -1]
            logits[:, 2] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_half_precision_model_is_steered_in_float32_and_rounded_once(
    model: Any, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    c = model.base_model(TOKENS).last_hidden_state
    steer = steers()["free"]
    w = steer.projector1[0].double() @ steer.projector2[0].double().T
    steered = (c.double() + 0.3 * 2.0 * (c.double() @ w)).to(dtype)
    with hf.steered(model, {"free": 2.0}, steers()):
        result = model(TOKENS).logits
    expected = model.lm_head(steered)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_an_unknown_name_is_refused(model: Any) -> None:
    with (
        pytest.raises(SteerError, match="steer happy is unknown; steers: free, dummy"),
        hf.steered(model, {"happy": 0.0}, steers()),
    ):
        pass


@pytest.mark.parametrize("name", ["free", "vector"])
def test_a_steer_of_another_width_is_refused(model: Any, name: str, make_steer: Any) -> None:
    variant = "multiply" if name == "free" else "add"
    with (
        pytest.raises(SteerError, match="the steer's width is 6; the model's LM head has 8"),
        hf.steered(model, {"other": 1.0}, {"other": make_steer(variant)}),
    ):
        pass


def test_an_offset_of_another_vocabulary_is_refused(model: Any, make_steer: Any) -> None:
    with (
        pytest.raises(
            SteerError, match=f"the steer's width is 11; the model's LM head has {VOCAB}"
        ),
        hf.steered(model, {"other": 1.0}, {"other": make_steer("offset")}),
    ):
        pass


def test_a_model_without_an_lm_head_is_refused(model: Any) -> None:
    with (
        pytest.raises(SteerError, match="has no LM head to steer"),
        hf.steered(model.base_model, {"free": 1.0}, steers()),
    ):
        pass


@torch.no_grad()
def test_a_column_fixed_twice_counts_once_or_is_refused(model: Any, make_steer: Any) -> None:
    vectors = torch.stack([torch.ones(8), torch.full((8,), 2.0)])
    try:
        steer = make_steer("add", add=vectors, hidden_size=8, fixed_columns=(1, 1))
    except SteerError:
        return
    c = model.base_model(TOKENS).last_hidden_state
    with hf.steered(model, {"s": 3.0}, {"s": steer}):
        result = model(TOKENS).logits
    expected = (c + 0.25 * (3.0 * vectors[0] + vectors[1])) @ model.lm_head.weight.T
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
