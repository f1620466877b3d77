"""The trainer on a small model: texts, labels, padding, dtypes and the cache."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vllm_steer import SteerError
from vllm_steer.embedded import MODEL
from vllm_steer.fit import fit_lm_steer
from vllm_steer.fit.encoded_texts import draw_batches, encode_texts
from vllm_steer.fit.lm_steer_settings import FitCallbacks
from vllm_steer.fit.objective import initial_parameters

EPSILON = 0.3
TEXTS = ["The hotel was wonderful.", "The flat was terrible and damp.", "Great!", "Dreadful."]
LABELS = [1.0, -1.0, 0.5, -0.5]
SMALL = {"rank": 3, "epsilon": EPSILON, "steps": 1, "max_length": 32, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def tiny_model(tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model(tokenizer)


def first_loss(model: Any, tokenizer: Any, **options: Any) -> float:
    """The loss before the first step."""
    losses: list[float] = []
    settings = {**SMALL, **options}
    callbacks = FitCallbacks(on_step=lambda _, loss: losses.append(loss))
    fit_lm_steer(model, tokenizer, TEXTS, LABELS, **settings, callbacks=callbacks)
    return losses[0]


def logits_by_hook(model: Any, ids: torch.Tensor, label: float, dummy: bool = True) -> Any:
    """The model's own logits with the start of a fit's steer in front of its head."""
    start = initial_parameters(
        "multiply",
        columns=2 if dummy else 1,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        rank=SMALL["rank"],
        initial_scale=1.0,
        seed=SMALL["seed"],
    )
    first, second = (value.to(model.dtype) for value in start.values())
    w = label * first[0] @ second[0].T + (first[1] @ second[1].T if dummy else 0)
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0] + EPSILON * args[0] @ w,))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    handle.remove()
    return logits


def losses_by_hook(model: Any, rows: list[torch.Tensor], labels: list[float]) -> torch.Tensor:
    """Of each token that has one before it, text after text."""
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(
                logits_by_hook(model, row, label)[:-1], row[1:], reduction="none"
            )
            for row, label in zip(rows, labels, strict=True)
        ]
    )


def ids_of(tokenizer: Any) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]


def test_the_loss_equals_that_of_the_model_with_the_steer_before_its_head(tokenizer: Any) -> None:
    model = tiny_model(tokenizer, torch.float64)
    expected = losses_by_hook(model, ids_of(tokenizer), LABELS).mean().item()
    assert first_loss(model, tokenizer, initial_scale=1.0) == pytest.approx(expected, rel=1e-10)


def test_padding_is_trained_on_if_requested(tokenizer: Any) -> None:
    model, rows = tiny_model(tokenizer, torch.float64), ids_of(tokenizer)
    longest = max(map(len, rows))
    padded = [
        torch.nn.functional.pad(row, (0, longest - len(row)), value=tokenizer.eos_token_id)
        for row in rows
    ]
    assert {len(row) for row in rows} != {longest}
    expected = losses_by_hook(model, padded, LABELS).mean().item()
    loss = first_loss(model, tokenizer, initial_scale=1.0, mask_padding=False)
    assert loss == pytest.approx(expected, rel=1e-10)


def test_a_text_is_padded_to_the_longest_of_its_own_batch(tokenizer: Any) -> None:
    encoded = encode_texts(tokenizer, TEXTS, max_length=32)
    lengths = [len(row) for row in encoded.rows]
    for batch in draw_batches(encoded, batch_size=2, steps=9, mask_padding=False, seed=0):
        assert batch.counts == (max(lengths[row] for row in batch.rows) - 1,) * 2
    row = lengths.index(min(lengths))
    targets = encoded.targets(row, lengths[row] + 2).tolist()
    assert targets == [*encoded.rows[row][1:].tolist(), *[tokenizer.eos_token_id] * 3]


@pytest.mark.parametrize("variant", ["multiply", "add", "offset"])
def test_one_step_is_one_step_of_adam(tokenizer: Any, variant: Any) -> None:
    model = tiny_model(tokenizer, torch.float64)
    start = initial_parameters(
        variant, columns=2, hidden_size=16, vocab_size=len(tokenizer), rank=3, initial_scale=0.01,
        seed=5,
    )  # fmt: skip
    leaves = {name: value.double().requires_grad_() for name, value in start.items()}
    losses = []
    for row, label in zip(ids_of(tokenizer), LABELS, strict=True):
        h = model.model(input_ids=row[None]).last_hidden_state[0, :-1].detach()
        v = torch.tensor([label, 1.0], dtype=torch.float64)
        if variant == "multiply":
            w = sum(v[s] * leaves["projector1"][s] @ leaves["projector2"][s].T for s in range(2))
            logits = model.lm_head(h + EPSILON * h @ w)
        elif variant == "add":
            logits = model.lm_head(h + EPSILON * (v @ leaves["add"]))
        else:
            logits = model.lm_head(h) + EPSILON * (v @ leaves["offset"])
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    loss = torch.cat(losses).mean() + 0.01 * sum(p.square().sum() for p in leaves.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    # The first step of Adam is the learning rate times g / (|g| + 1e-8).
    expected = {
        name: (p - 0.1 * g / (g.abs() + 1e-8)).detach()
        for (name, p), g in zip(leaves.items(), gradients, strict=True)
    }
    options = {**SMALL, "variant": variant, "learning_rate": 0.1, "regularization": 0.01}
    steer = fit_lm_steer(model, tokenizer, TEXTS, LABELS, **options)
    assert steer.variant == variant
    torch.testing.assert_close(steer.tensors, expected, rtol=1e-6, atol=1e-8)


def test_master_weights_of_a_half_precision_model_are_float32(tokenizer: Any) -> None:
    wide = tiny_model(tokenizer)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tiny_model(tokenizer, dtype)
        steer = fit_lm_steer(narrow, tokenizer, TEXTS, LABELS, **SMALL | {"steps": 3})
        assert steer.projector1.dtype == torch.float32
        assert not torch.equal(steer.projector1, steer.projector1.to(dtype).float())
        expected = first_loss(wide, tokenizer, initial_scale=1.0)
        loss = first_loss(narrow, tokenizer, initial_scale=1.0)
        assert loss == pytest.approx(expected, rel=2e-2)


def test_a_small_cache_recomputes_the_states_and_gives_the_same_steer(tokenizer: Any) -> None:
    model, messages = tiny_model(tokenizer, torch.float64), []
    options = {**SMALL, "steps": 4, "batch_size": 3}
    stored = fit_lm_steer(model, tokenizer, TEXTS, LABELS, **options)
    again = fit_lm_steer(
        model,
        tokenizer,
        TEXTS,
        LABELS,
        **options,
        cache_bytes=0,
        callbacks=FitCallbacks(on_message=messages.append),
    )
    torch.testing.assert_close(again.tensors, stored.tensors, rtol=1e-9, atol=1e-9)
    assert "computed for each step" in messages[0]


def test_each_text_is_read_once(model: Any, tokenizer: Any) -> None:
    read, lengths = [], []
    body = model.base_model
    handle = body.register_forward_pre_hook(
        lambda _module, _args, inputs: lengths.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    fit_lm_steer(
        model,
        tokenizer,
        TEXTS,
        LABELS,
        **SMALL | {"steps": 20},
        callbacks=FitCallbacks(on_text=lambda done, total: read.append((done, total))),
    )
    handle.remove()
    assert read == [(1, 4), (2, 4), (3, 4), (4, 4)]
    longest = max(map(len, ids_of(tokenizer))) - 1
    assert lengths[2:] == [(4, longest)]  # two were to see that the head is understood


def test_a_dummy_column_has_the_value_one_for_every_label(tokenizer: Any) -> None:
    model, rows = tiny_model(tokenizer, torch.float64), ids_of(tokenizer)
    loss = [
        torch.nn.functional.cross_entropy(
            logits_by_hook(model, row, label, dummy=False)[:-1], row[1:], reduction="none"
        )
        for row, label in zip(rows, LABELS, strict=True)
    ]
    without = first_loss(model, tokenizer, initial_scale=1.0, dummy=False)
    assert without == pytest.approx(torch.cat(loss).mean().item(), rel=1e-10)
    assert without != pytest.approx(first_loss(model, tokenizer, initial_scale=1.0), rel=1e-4)


@pytest.mark.parametrize(("dummy", "fixed"), [(True, (1,)), (False, ())])
def test_dummy_column_is_fixed_in_the_steer(
    model: Any, tokenizer: Any, dummy: bool, fixed: tuple[int, ...]
) -> None:
    steer = fit_lm_steer(model, tokenizer, TEXTS, LABELS, rank=2, steps=1, dummy=dummy)
    assert steer.fixed_columns == fixed
    assert steer.columns == len(fixed) + 1


def test_same_seed_gives_the_same_steer(model: Any, tokenizer: Any) -> None:
    first, second, other = (
        fit_lm_steer(model, tokenizer, TEXTS, LABELS, rank=2, steps=3, batch_size=2, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.projector1, second.projector1)
    assert torch.equal(first.projector2, second.projector2)
    assert first.recipe == second.recipe
    assert not torch.equal(first.projector1, other.projector1)


def test_the_loss_falls_and_the_model_is_unchanged(tokenizer: Any) -> None:
    model = tiny_model(tokenizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses: list[float] = []
    callbacks = FitCallbacks(on_step=lambda _, loss: losses.append(loss))
    options = {"rank": 8, "epsilon": 1.0, "steps": 40}
    fit_lm_steer(model, tokenizer, TEXTS, LABELS, **options, callbacks=callbacks)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_dropout_is_off_while_texts_are_read(tokenizer: Any) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), **ends)
    model = GPT2LMHeadModel(config).train()
    assert first_loss(model, tokenizer) == first_loss(model.eval(), tokenizer)


def test_a_text_of_one_token_is_left_out(model: Any, tokenizer: Any) -> None:
    losses: list[float] = []
    callbacks = FitCallbacks(on_step=lambda _, loss: losses.append(loss))
    steer = fit_lm_steer(
        model, tokenizer, ["", *TEXTS], [1.0, *LABELS], **SMALL, callbacks=callbacks
    )
    assert len(tokenizer("")["input_ids"]) < 2
    assert losses[0] == pytest.approx(first_loss(model, tokenizer), rel=1e-5)
    assert (steer.recipe or {})["figures"]["texts_used"] == 4


def test_the_recipe_records_how_the_steer_was_made(model: Any, tokenizer: Any) -> None:
    recipe = fit_lm_steer(model, tokenizer, TEXTS, LABELS, **SMALL | {"steps": 2}).recipe or {}
    assert recipe["method"] == "lm-steer"
    assert SMALL.items() - {("steps", 1)} <= recipe["settings"].items()
    tokens = sum(len(row) - 1 for row in ids_of(tokenizer))
    assert recipe["figures"]["tokens_seen"] == 2 * tokens
    assert recipe["figures"]["final_loss"] < recipe["figures"]["first_loss"]


def test_logits_that_the_head_does_not_explain_are_refused(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: 3 * logits)
    with pytest.raises(SteerError, match="its logits are not those of its LM head"):
        fit_lm_steer(model, tokenizer, TEXTS, LABELS, **SMALL)


@pytest.mark.parametrize(
    ("options", "attribute", "value"),
    [("logit_scale", "logit_scale", 2.0), ("soft cap", "final_logit_softcapping", 1.5)],
)
def test_a_logit_scale_or_cap_of_the_model_is_applied(
    tokenizer: Any, options: str, attribute: str, value: float
) -> None:
    """The hook applies the scale or cap of the config to the logits."""
    model = tiny_model(tokenizer, torch.float64)
    plain = losses_by_hook(model, ids_of(tokenizer), LABELS).mean().item()
    setattr(model.config, attribute, value)
    change = (
        (lambda x: value * x)
        if options == "logit_scale"
        else (lambda x: value * torch.tanh(x / value))
    )
    model.lm_head.register_forward_hook(lambda _module, _args, logits: change(logits))
    expected = losses_by_hook(model, ids_of(tokenizer), LABELS).mean().item()
    assert expected != pytest.approx(plain, rel=1e-6)
    assert first_loss(model, tokenizer, initial_scale=1.0) == pytest.approx(expected, rel=1e-10)


def test_a_nan_loss_stops_the_fit_and_names_the_step(model: Any, tokenizer: Any) -> None:
    with pytest.raises(SteerError, match=r"step [1-9]\d*: the loss is (nan|inf)"):
        fit_lm_steer(
            model, tokenizer, TEXTS, LABELS, rank=3, epsilon=1.0, steps=50, learning_rate=1e25
        )


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([], [], "0 texts and 0 labels"),
        (["a"], [1.0, 1.0], "1 texts and 2 labels"),
        (["a"], [5.0], r"label 5.0; labels lie in \[-1, 1\]"),
        (["a b", "c d"], [1.0, 1.0], "all 2 labels are 1; a fit needs texts with diff"),
        (["", ""], [1.0, -1.0], "none of the 2 texts has two tokens"),
    ],
    ids=["no texts", "a label too many", "label out of range", "one label", "empty texts"],
)
def test_wrong_texts_and_labels_are_refused(
    model: Any, tokenizer: Any, texts: list[str], labels: list[float], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        fit_lm_steer(model, tokenizer, texts, labels)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"variant": "divide"}, "variant is 'divide'; allowed: multiply, add, offset"),
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a positive number"),
        ({"initial_scale": 0.0}, "initial_scale is 0.0; expected a positive number"),
        ({"regularization": -1.0}, "regularization is -1.0; expected 0 or more"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808; expected a number from 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_settings_are_refused(
    model: Any, tokenizer: Any, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        fit_lm_steer(model, tokenizer, TEXTS, LABELS, **setting)
