"""Fitted vectors and deltas against a few lines of float64 code, on a tiny random model."""

from typing import Any

import pytest
import torch
import transformers

from vllm_steer import SteerError, hf
from vllm_steer.embedded import MODEL
from vllm_steer.fit import activations, fit_delta, fit_vector, fit_vector_by_likelihood

LAYERS, HIDDEN, HEADS_WIDE = 3, 16, 24
POSITIVE = ["The hotel was wonderful.", "Great!", "A splendid view, and we were charmed by it."]
NEGATIVE = ["The flat was terrible and damp.", "Dreadful."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEADS_WIDE // 2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def hidden_states(model: Any, ids: list[int], site: str, layer: int) -> torch.Tensor:
    """``[tokens, width]`` of one text, unpadded, at a site found by its name."""
    block = f"model.layers.{layer}"
    losses: list[torch.Tensor] = []
    if site == "heads":
        module = model.get_submodule(f"{block}.self_attn.o_proj")
        hook = module.register_forward_pre_hook(lambda _, args: losses.append(args[0]))
    else:
        path = {"resid": block, "attn_in": f"{block}.input_layernorm"}[site]
        module = model.get_submodule(path)
        hook = module.register_forward_hook(lambda _m, _a, out: losses.append(out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return losses[0][0]


def all_tokens(model: Any, tokenizer: Any, texts: list[str], site: str, layer: int) -> torch.Tensor:
    """Every token of the texts but the one that begins each, ``[tokens, width]``."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return torch.cat([hidden_states(model, ids, site, layer)[1:] for ids in rows])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_activations_of_a_batch_are_those_of_each_text_alone(
    model: Any, tokenizer: Any, batch_size: int
) -> None:
    result = activations(
        model, tokenizer, POSITIVE, site="heads", layers=(0, 2), batch_size=batch_size
    )
    for text, tensor in zip(POSITIVE, result, strict=True):
        for column, layer in enumerate((0, 2)):
            expected = all_tokens(model, tokenizer, [text], "heads", layer)
            torch.testing.assert_close(tensor[:, column], expected, rtol=1e-12, atol=1e-12)


def test_activations_are_those_of_the_first_tokens(model: Any, tokenizer: Any) -> None:
    (result,) = activations(model, tokenizer, POSITIVE[2:], site="resid", layers=(1,), max_length=4)
    expected = all_tokens(model, tokenizer, POSITIVE[2:], "resid", 1)[:3]
    torch.testing.assert_close(result[:, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("site", ["resid", "attn_in"])
def test_a_mean_vector_is_the_difference_of_the_means_over_tokens(
    model: Any, tokenizer: Any, site: Any
) -> None:
    steer = fit_vector(model, tokenizer, POSITIVE, NEGATIVE, site=site, batch_size=2)
    assert (steer.layers, steer.site, steer.mode) == ((0, 1, 2), site, "add")
    assert steer.vectors.dtype == torch.float32
    for layer in range(LAYERS):
        positive = all_tokens(model, tokenizer, POSITIVE, site, layer)
        negative = all_tokens(model, tokenizer, NEGATIVE, site, layer)
        expected = positive.mean(0) - negative.mean(0)
        torch.testing.assert_close(steer.vectors[layer].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_unit_vector_weighs_every_token_equally(model: Any, tokenizer: Any) -> None:
    steer = fit_vector(
        model,
        tokenizer,
        POSITIVE,
        NEGATIVE,
        site="attn_in",
        mode="rotate",
        direction="unit",
        layers=[2, 0],
    )
    assert (steer.layers, steer.mode) == ((0, 2), "rotate")
    for row, layer in enumerate(steer.layers):
        positive = all_tokens(model, tokenizer, POSITIVE, "attn_in", layer)
        negative = all_tokens(model, tokenizer, NEGATIVE, "attn_in", layer)
        mean = torch.cat([positive, negative]).mean(0)
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for sign, tokens in ((1, positive), (-1, negative)):
            for x in tokens:
                total += sign * (x - mean) / (x - mean).norm()
        expected = total / total.norm()
        torch.testing.assert_close(steer.vectors[row].double(), expected, rtol=1e-6, atol=1e-7)


def answer(model: Any, ids: list[int], steps: int, ends: set[int]) -> list[list[int]]:
    """The text at each step, its last token the one that is recorded; no KV cache."""
    texts = []
    for _ in range(steps):
        texts.append(list(ids))
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids = [*ids, token]
    return texts


def delta_by_hand(
    model: Any, tokenizer: Any, sides: tuple[list[str], list[str]], steps: int, ends: set[int]
) -> torch.Tensor:
    """``[steps, layers, width]``: every step's text read as a whole."""
    means = []
    for prompts in sides:
        texts = [answer(model, tokenizer(p)["input_ids"], steps, ends) for p in prompts]
        rows = []
        for i in range(steps):
            reached = [text[i] for text in texts if i < len(text)]
            last = [
                torch.stack([hidden_states(model, ids, "heads", n)[-1] for n in range(LAYERS)])
                for ids in reached
            ]
            rows.append(torch.stack(last).mean(0))
        means.append(torch.stack(rows))
    return means[0] - means[1]


def test_a_delta_is_the_difference_of_the_means_per_step(model: Any, tokenizer: Any) -> None:
    expected = delta_by_hand(model, tokenizer, (POSITIVE, NEGATIVE), 4, set())
    steer = fit_delta(model, tokenizer, POSITIVE, NEGATIVE, steps=4, batch_size=2)
    assert (steer.site, steer.layers, steer.schedule) == ("heads", (0, 1, 2), "fixed")
    assert steer.delta.shape == (4, LAYERS, HEADS_WIDE)
    torch.testing.assert_close(steer.delta.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_answer_that_ended_counts_no_more(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenizer(POSITIVE[0])["input_ids"]
    end = answer(model, first, 3, set())[2][-1]  # its second token, made the end of the text
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 1])
    expected = delta_by_hand(model, tokenizer, (POSITIVE, NEGATIVE), 4, {end, 1})
    assert len(answer(model, first, 4, {end, 1})) == 2
    steer = fit_delta(model, tokenizer, POSITIVE, NEGATIVE, steps=4)
    torch.testing.assert_close(steer.delta.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(SteerError, match=r"wanted prompts ended before step 2; .* steps=2"):
        fit_delta(model, tokenizer, POSITIVE[:1], NEGATIVE, steps=4)


def test_the_same_texts_give_the_same_steers(model: Any, tokenizer: Any) -> None:
    first, second = (fit_vector(model, tokenizer, POSITIVE, NEGATIVE) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    one, two = (fit_delta(model, tokenizer, POSITIVE, NEGATIVE, steps=3) for _ in range(2))
    assert torch.equal(one.delta, two.delta)


def test_progress_is_reported(model: Any, tokenizer: Any) -> None:
    texts: list[int] = []
    fit_vector(model, tokenizer, POSITIVE, NEGATIVE, direction="unit", on_text=texts.append)
    assert texts == list(range(1, 11))
    prompts: list[int] = []
    fit_delta(model, tokenizer, POSITIVE, NEGATIVE, steps=1, on_prompt=prompts.append)
    assert prompts == [1, 2, 3, 4, 5]


def test_a_fitted_vector_moves_one_mean_onto_the_other(model: Any, tokenizer: Any) -> None:
    steer = fit_vector(model, tokenizer, POSITIVE, NEGATIVE, layers=(1,))
    with hf.steered(model, {"praise": 1.0}, {"praise": steer}):
        moved = all_tokens(model, tokenizer, NEGATIVE, "resid", 1)
    # The hook that reads was placed after the one that steers.
    expected = all_tokens(model, tokenizer, POSITIVE, "resid", 1)
    torch.testing.assert_close(moved.mean(0), expected.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layer 3 does not exist: this model has layers 0 to 2"),
        ({"direction": "lda"}, "direction is 'lda'; allowed: mean, unit, pca"),
        ({"mode": "turn"}, "mode is 'turn'; allowed: add, rotate"),
        ({"positive_texts": []}, "0 positive and 2 negative texts; both sides need at least one"),
        ({"negative_texts": ["fine", ""]}, "text '' has no token but special ones"),
    ],
)
def test_a_vector_that_cannot_be_fitted_is_refused(
    model: Any, tokenizer: Any, arguments: dict[str, Any], message: str
) -> None:
    texts = {"positive_texts": POSITIVE, "negative_texts": NEGATIVE}
    with pytest.raises(SteerError, match=message):
        fit_vector(model, tokenizer, **texts | arguments)


def test_a_delta_that_cannot_be_fitted_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(SteerError, match="there are no other prompts; give at least one"):
        fit_delta(model, tokenizer, POSITIVE, [])
    with pytest.raises(SteerError, match="site is 'logits'; allowed: heads, resid"):
        fit_delta(model, tokenizer, POSITIVE, NEGATIVE, site="logits", steps=1)  # type: ignore[arg-type]


def signed_loss(
    model: Any, ids: list[int], shift: torch.Tensor, layer: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood of one text with ``shift`` added after a layer, and the
    weights' sum.
    """
    block = model.get_submodule(f"model.layers.{layer}")
    hook = block.register_forward_hook(lambda _m, _a, out: out + shift)
    logprobs = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0], -1)
    hook.remove()
    picked = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -(picked * weights[1:]).sum(), weights[1:].sum()


def test_the_first_step_by_likelihood_goes_against_the_gradient_of_the_signed_texts(
    model: Any, tokenizer: Any
) -> None:
    texts, labels, layer, rate = [*POSITIVE, *NEGATIVE], [1.0, 1, 1, -1, -1], 1, 0.5
    focused = [text.index(" ") if " " in text else 0 for text in texts]
    spans = dict(zip(texts, focused, strict=True))
    start = 0.01 * torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    vector = start.double().requires_grad_()
    losses, counts = [], []
    for text, label in zip(texts, labels, strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True)
        weights = torch.tensor(
            [0.2 if end <= spans[text] else 1.0 for _, end in encoded["offset_mapping"]]
        )
        loss, count = signed_loss(model, encoded["input_ids"], label * vector[0], layer, weights)
        losses.append(loss)
        counts.append(count)
    total = torch.stack(losses).sum() / torch.stack(counts).sum()
    (gradient,) = torch.autograd.grad(total, vector)

    states: list[float] = []
    steer = fit_vector_by_likelihood(
        model,
        tokenizer,
        texts,
        labels,
        layers=[layer],
        focus=lambda text: [(spans[text], len(text))],
        background=0.2,
        learning_rate=rate,
        steps=1,
        seed=3,
        on_step=lambda _, loss: states.append(loss),
    )
    assert states == [pytest.approx(total.item(), rel=1e-5)]
    clear = gradient.abs() > 1e-6  # Adam's first step is the rate times the sign
    assert clear.sum() > HIDDEN // 2
    expected = (start.double() - rate * gradient.sign()).float()
    torch.testing.assert_close(steer.vectors[clear], expected[clear], rtol=1e-2, atol=0)


def test_a_fit_by_likelihood_raises_the_likelihood_and_is_deterministic(
    model: Any, tokenizer: Any
) -> None:
    def fit(**options: Any) -> Any:
        labels = [1.0] * len(POSITIVE) + [-1.0] * len(NEGATIVE)
        return fit_vector_by_likelihood(
            model,
            tokenizer,
            POSITIVE + NEGATIVE,
            labels,
            layers=[1, 2],
            learning_rate=0.1,
            steps=12,
            **options,
        )

    losses: list[float] = []
    first = fit(on_step=lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.1
    assert first.layers == (1, 2)
    assert torch.equal(first.vectors, fit().vectors)


def test_a_fit_by_likelihood_needs_a_label_for_each_text(model: Any, tokenizer: Any) -> None:
    with pytest.raises(SteerError, match="1 texts and 2 labels"):
        fit_vector_by_likelihood(model, tokenizer, ["a"], [1.0, -1.0], layers=[0])
