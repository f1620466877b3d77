"""Fitted low-rank maps against hand-written passes of a tiny random model in float64."""

from typing import Any

import pytest
import torch
from fit_model import HIDDEN, LAYERS, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy

from vllm_steer import LowRankSteer, SteerError, hf, load_steer, save_steer
from vllm_steer.fit import fit_low_rank
from vllm_steer.fit.lm_steer_settings import FitCallbacks
from vllm_steer.fit.low_rank_maps import (
    PARAMETERIZATIONS,
    factors,
    initial_parameters,
    orthonormal_rows,
)
from vllm_steer.fit.low_rank_settings import LowRankSettings
from vllm_steer.fit.low_rank_training import (
    LowRankFit,
    batch_gradients,
    mean_loss,
    train,
    training_text,
)
from vllm_steer.fit.scored_texts import ScoredText, TextEncoding, encode_scored
from vllm_steer.hf.lm_head import head_of

PAIRS = [
    ("The hotel was", " wonderful, and so was the view."),
    ("We found the flat", " terrible."),
    ("Film Nova:", " a scandal!"),
    ("Hotel Astoria:", " charming and quiet."),
]
WINDOWS = {"prompt": [":2", "-1:"], "answer": "1:3"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def texts(count: int, seed: int = 0, length: int = 9) -> list[ScoredText]:
    """Random tokens of different lengths, scored from different places on."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = tiny_model().config.vocab_size
    return [
        ScoredText(
            torch.randint(vocabulary, (length - row % 3,), generator=generator, dtype=torch.int32),
            start=1 + row % 4,
        )
        for row in range(count)
    ]


def fit_of(scored: list[ScoredText], strengths: list[float], **options: Any) -> LowRankFit:
    settings = LowRankSettings(**options)
    made = [training_text(one, v, settings) for one, v in zip(scored, strengths, strict=True)]
    model = tiny_model()
    return LowRankFit(model, head_of(model), made, [], settings.layers or (1,), HIDDEN, settings)


def gram_schmidt(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span the first of the rows, one after the other."""
    result: list[torch.Tensor] = []
    for row in rows:
        for other in result:
            row = row - (row @ other) * other
        result.append(row / row.norm())
    return torch.stack(result)


def map_by_hand(name: str, parameters: dict[str, torch.Tensor], index: int, h: Any) -> Any:
    """What the map of a layer adds to one token ``h [width]``, by the papers' equations."""
    weight = parameters["weight"][index]
    if name == "loreft":
        rotation = gram_schmidt(parameters["rotation"][index])
        return rotation.T @ (weight @ h + parameters["bias"][index] - rotation @ h)
    if name == "direft":
        return parameters["up"][index].T @ (weight @ h + parameters["bias"][index])
    return (h @ weight.T) @ parameters["up"][index]


def acts(windows: Any, position: int, prompt: int, length: int) -> bool:
    if windows == "all":
        return True
    in_prompt = [*range(prompt)][:2] + [*range(prompt)][-1:]
    in_answer = [prompt - 1 + step for step in (1, 2)]
    return position in in_prompt or position in in_answer


def loss_by_hand(
    name: str,
    parameters: dict[str, torch.Tensor],
    scored: list[ScoredText],
    strengths: list[float],
    layers: tuple[int, ...],
    windows: Any = "all",
) -> torch.Tensor:
    """The mean loss of the scored tokens, each text alone, the map token by token."""
    model, losses = tiny_model(), []
    for one, v in zip(scored, strengths, strict=True):
        ids = one.ids.long()

        def act(x: torch.Tensor, index: int, v: float = v, one: ScoredText = one) -> torch.Tensor:
            rows = [
                h + v * map_by_hand(name, parameters, index, h)
                if acts(windows, position, one.start, len(one.ids))
                else h
                for position, h in enumerate(x[0])
            ]
            return torch.stack(rows)[None]

        def hook(_m: Any, _a: Any, out: Any, index: int, act: Any = act) -> Any:
            return (act(out[0], index), *out[1:]) if isinstance(out, tuple) else act(out, index)

        handles = [
            model.model.layers[layer].register_forward_hook(
                lambda m, a, out, index=index, hook=hook: hook(m, a, out, index)
            )
            for index, layer in enumerate(layers)
        ]
        logits = model(ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        predicted = logits[one.start - 1 : -1]
        losses.append(cross_entropy(predicted, ids[one.start :], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("windows", ["all", WINDOWS], ids=["all", "windows"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_loss_and_gradient_are_those_of_a_pass_by_hand(name: Any, windows: Any) -> None:
    scored, strengths, layers = texts(4), [1.0, -1.0, 0.5, 1.0], (0, 2)
    options = {"parameterization": name, "rank": 3, "layers": layers, "phase": windows}
    fit = fit_of(scored, strengths, **options)
    start = initial_parameters(name, layers=2, width=HIDDEN, rank=3, seed=1)
    parameters = {
        key: value.double() + 0.2 * normal(*value.shape, seed=number)
        for number, (key, value) in enumerate(start.items())
    }
    loss, gradients = batch_gradients(fit, fit.train, parameters)
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    expected = loss_by_hand(name, leaves, scored, strengths, layers, windows)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert mean_loss(fit, fit.train, factors(parameters)) == pytest.approx(loss, rel=1e-12)
    for key, leaf in leaves.items():
        torch.testing.assert_close(gradients[key], leaf.grad, rtol=1e-8, atol=1e-12)


def test_the_loss_without_a_map_is_the_models_own() -> None:
    scored = texts(5)
    fit = fit_of(scored, [1.0] * 5, batch_size=2)
    total, count = 0.0, 0
    for one in scored:
        ids = one.ids.long()
        labels = ids.clone()
        labels[: one.start] = -100
        with torch.no_grad():
            total += tiny_model()(ids[None], labels=labels[None]).loss.item() * one.num_scored
        count += one.num_scored
    assert mean_loss(fit, fit.train, None) == pytest.approx(total / count, rel=1e-6)
    start = initial_parameters("loreft", layers=1, width=HIDDEN, rank=4, seed=0)
    assert mean_loss(fit, fit.train, factors(start)) == pytest.approx(total / count, rel=1e-5)


def sampled(planted: LowRankSteer, count: int, length: int) -> list[ScoredText]:
    """Texts of the model under a planted map, sampled token by token."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(tiny_model().config.vocab_size, (count, 2), generator=generator)
    with hf.steered(tiny_model(), {"planted": 1.0}, {"planted": planted}), torch.no_grad():
        for _ in range(length):
            logits = tiny_model()(ids).logits[:, -1]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, token], 1)
    return [ScoredText(row.int(), start=2) for row in ids]


def test_a_planted_map_is_learnt_from_the_texts_of_the_model_under_it() -> None:
    rotation = orthonormal_rows(normal(1, 2, HIDDEN, seed=7))
    weight = rotation + 0.7 * normal(1, 2, HIDDEN, seed=8)
    bias = 3 * normal(1, 2, seed=9)
    planted = LowRankSteer(a=weight - rotation, b=rotation.mT.contiguous(), bias=bias, layers=(1,))
    scored = sampled(planted, 200, 10)
    options = {"rank": 2, "layers": (1,), "steps": 150, "batch_size": 50, "learning_rate": 0.05}
    fit = fit_of(scored, [1.0] * 200, **options)
    before = mean_loss(fit, fit.train, None)
    goal = mean_loss(
        fit, fit.train, factors({"rotation": rotation, "weight": weight, "bias": bias})
    )
    training = train(fit, None, FitCallbacks())
    after = mean_loss(fit, fit.train, factors(training.parameters))
    assert before > goal + 0.2
    assert after < goal + 0.05 * (before - goal)
    rows = factors(training.parameters).b[0].T
    torch.testing.assert_close(rows @ rows.T, torch.eye(2).double(), rtol=0, atol=1e-10)


def test_the_rows_of_a_loreft_are_orthonormal_in_the_file(tmp_path: Any) -> None:
    steer = fit_low_rank(
        tiny_model(), tiny_tokenizer(), PAIRS, rank=5, layers=[0, 2], steps=5, learning_rate=0.1
    )
    save_steer(steer, tmp_path / "map.safetensors")
    loaded = load_steer(tmp_path / "map.safetensors")
    assert (loaded.layers, loaded.site, loaded.rank) == ((0, 2), "resid", 5)
    for b in loaded.b:
        torch.testing.assert_close(b.T @ b, torch.eye(5).to(b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("phase", ["all", "answer", WINDOWS], ids=["all", "answer", "windows"])
def test_the_held_out_loss_is_that_of_the_steered_model(name: Any, phase: Any) -> None:
    model, (prompt, answer) = tiny_model(), PAIRS[0]
    steer = fit_low_rank(
        *(model, tiny_tokenizer(), [PAIRS[0]] * 4),
        parameterization=name,
        site="attn_out",
        phase=phase,
        steps=4,
        learning_rate=0.05,
        valid_share=0.5,
    )
    assert (steer.bias is None) == (name == "lm-steer")
    assert steer.layers == (LAYERS // 2,)
    length = len(tiny_tokenizer()(prompt)["input_ids"])
    ids = torch.tensor([[*tiny_tokenizer()(prompt + answer)["input_ids"], 1]])
    figures = (steer.recipe or {})["figures"]
    assert figures["valid_texts"] == figures["train_texts"] == 2
    for value, key in ((0.0, "valid_loss_before"), (1.0, "valid_loss_after")):
        dose = {"strength": value, "phase": phase}
        with hf.steered(model, {"m": dose}, {"m": steer}, prompt_length=length), torch.no_grad():
            logits = model(ids).logits[0]
        expected = cross_entropy(logits[length - 1 : -1], ids[0, length:]).item()
        assert figures[key] == pytest.approx(expected, rel=1e-9)
    assert figures["valid_loss_after"] < figures["valid_loss_before"]
    assert figures["first_loss"] == pytest.approx(figures["valid_loss_before"], rel=1e-5)


def test_texts_are_scored_whole_and_made_likely_at_their_own_strength() -> None:
    plain = ["The hotel was wonderful.", "The flat was terrible."]
    fitted = fit_low_rank(
        *(tiny_model(), tiny_tokenizer(), plain * 4, [1.0, -1.0] * 4),
        steps=30,
        learning_rate=0.02,
        valid_share=0,
    )
    figures = (fitted.recipe or {})["figures"]
    lengths = [len(tiny_tokenizer()(text)["input_ids"]) - 1 for text in plain]
    assert figures["scored_tokens"] == 4 * sum(lengths)
    assert figures["valid_loss_after"] is None
    for text, own in zip(plain, (1.0, -1.0), strict=True):
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        losses = []
        for strength in (own, -own):
            with hf.steered(tiny_model(), {"m": strength}, {"m": fitted}), torch.no_grad():
                losses.append(tiny_model()(ids, labels=ids).loss.item())
        assert losses[0] < losses[1] - 0.1


def test_equal_arguments_give_equal_maps_and_another_seed_gives_another() -> None:
    def fit(seed: int) -> LowRankSteer:
        return fit_low_rank(tiny_model(), tiny_tokenizer(), PAIRS, steps=3, seed=seed)

    one, two, other = fit(1), fit(1), fit(2)
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b) and one.recipe == two.recipe
    assert not torch.equal(one.b, other.b)


def test_an_interrupted_fit_goes_on_to_the_same_map(tmp_path: Any) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 2, "weight_decay": 0.1}

    def stop(step: int, _loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    arguments = (tiny_model(), tiny_tokenizer(), PAIRS)
    whole = fit_low_rank(*arguments, **options)
    resumable = {**options, "run_folder": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit_low_rank(*arguments, **resumable, callbacks=FitCallbacks(on_step=stop))
    messages: list[str] = []
    steps: list[int] = []
    callbacks = FitCallbacks(on_step=lambda step, _: steps.append(step), on_message=messages.append)
    resumed = fit_low_rank(*arguments, **resumable, callbacks=callbacks)
    assert messages == ["going on after step 2 of 6"] and steps == [2, 3, 4, 5]
    assert torch.equal(whole.a, resumed.a) and torch.equal(whole.b, resumed.b)
    with pytest.raises(SteerError, match="rank was 4 and is now 5"):
        fit_low_rank(*arguments, **{**resumable, "rank": 5})


def test_the_model_keeps_its_weights_and_its_mode() -> None:
    model = tiny_model()

    def hooks() -> list[int]:  # Transformers may have hooks of its own
        return [len(module._forward_hooks) for module in model.modules()]

    hooks_before = hooks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    fit_low_rank(model, tiny_tokenizer(), PAIRS, steps=2, learning_rate=0.5)
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks() == hooks_before


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 texts and 0 strengths; give at least one text"),
        (PAIRS, {"strengths": [1.0]}, "4 texts and 1 strengths"),
        (PAIRS, {"strengths": [1.0, 1.0, 0.0, 1.0]}, "a text has strength 0.0; expected finite"),
        (PAIRS, {"rank": HIDDEN + 1}, "rank is 17; the site resid of this model is 16 wide"),
        (PAIRS, {"rank": 0}, "rank is 0; expected at least 1"),
        (PAIRS, {"layers": [3]}, "layer 3 does not exist: this model has layers 0 to 2"),
        (PAIRS, {"layers": []}, r"layers is \[\]; expected different numbers"),
        (PAIRS, {"layers": [1, 1]}, r"layers is \[1, 1\]; expected different numbers"),
        (PAIRS, {"site": "heads"}, "site is 'heads'"),
        (PAIRS, {"parameterization": "lora"}, "parameterization is 'lora'"),
        (PAIRS, {"phase": "middle"}, "phase 'middle'; allowed: all, prompt"),
        (PAIRS, {"phase": {"answer": "60:"}}, "acts on no token before the last of any text"),
        (PAIRS, {"valid_share": 1.0}, "valid_share is 1.0; expected 0 or more, below 1"),
        (PAIRS[:1], {}, "1 texts, of which valid_share 0.1 holds out 1: none is left"),
        (PAIRS, {"learning_rate": float("nan")}, "learning_rate is nan; expected a positive"),
        (PAIRS, {"weight_decay": -1.0}, "weight_decay is -1.0; expected 0 or more"),
        (PAIRS, {"max_length": 3}, "of the first 3 tokens .max_length. none is the answer's"),
        (["A text."], {"phase": "answer"}, "texts without a prompt have no such part"),
        (["A text."], {"chat_template": True}, "has no prompt; the chat template needs prompts"),
        ([""], {"valid_share": 0}, "none of the 1 texts has two tokens"),
        (PAIRS, {"learning_rate": 1e200, "steps": 4}, "step [0-9]: .*not finite|loss is"),
    ],
)
def test_what_cannot_be_fitted_is_refused(texts: Any, options: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        fit_low_rank(tiny_model(), tiny_tokenizer(), texts, **{"steps": 1, **options})


def test_in_a_chat_template_the_answer_is_what_follows_the_users_message() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_scored(tokenizer, ("Film Nova:", "a scandal!"), TextEncoding(64, True))
    assert encoded is not None
    whole = tokenizer("<s>Film Nova: a scandal!", add_special_tokens=False)["input_ids"]
    before = tokenizer("<s>Film Nova:", add_special_tokens=False)["input_ids"]
    assert (encoded.ids.tolist(), encoded.start) == (whole, len(before))
