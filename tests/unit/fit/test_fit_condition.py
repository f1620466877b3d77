"""Conditions from prompts: a toy whose answer is known, and the equations on a tiny Llama."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fit_model import HIDDEN, LAYERS, tiny_model, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

from vllm_steer import SteerError, hf, load_steer
from vllm_steer.cli import app
from vllm_steer.embedded import corpus
from vllm_steer.fit import fit_condition
from vllm_steer.fit.activations import SelectedTokens
from vllm_steer.fit.condition import split
from vllm_steer.fit.prompt_states import mean_states, similarity_extremes
from vllm_steer.fit.prompts import encode_prompt
from vllm_steer.fit.thresholds import Scores, best_threshold
from vllm_steer.steers import ConditionSteer, VectorSteer

WIDTH = 16
GOOD, BAD, ODD = "abcdefgh", "ABCDEFGH", "xyz"


class Lookup(nn.Module):
    """A layer whose output is a row per token, whatever comes in."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


class Toy(nn.Module):
    """Three layers: nothing, the planted direction, and a direction with errors."""

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_size=WIDTH,
    )
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        noise = 0.1 * torch.randn(3, 128, WIDTH, generator=generator)
        same = torch.ones(128, WIDTH)
        planted, wrong = noise[1].clone(), noise[2].clone()
        for letter in range(128):
            kind = 1.0 if chr(letter) in BAD else -1.0
            planted[letter, 3] += kind
            # The third layer takes half of the letters for the other kind.
            wrong[letter, 3] += kind * (-1 if letter % 2 else 1)
        self.layers = nn.ModuleList(map(Lookup, (same, planted, wrong)))

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = torch.zeros(*input_ids.shape, WIDTH)
        for layer in self.layers:
            x = layer(x, input_ids)
        return x


class Letters:
    """A token for each letter, after a special one."""

    all_special_ids = (0,)
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, text)]}


def words(last: str, count: int, seed: int, inside: str = GOOD + BAD) -> list[str]:
    """Random words that end in one of some letters."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choices(inside, k=4)) + generator.choice(last)] = None
    return list(found)


def fit_toy(positive: list[str], negative: list[str], **options: Any) -> Any:
    return fit_condition(Toy(), Letters(), positive, negative, **options)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_planted_layer_and_direction_are_found(similarity: Any, batch_size: int) -> None:
    found = fit_toy(
        words(BAD, 30, 1), words(GOOD, 30, 2), similarity=similarity, batch_size=batch_size
    )
    steer = found.steer
    assert steer.layers == (1,) and steer.side == "above" and steer.tokens == "last"
    assert abs(steer.threshold) < 0.5 and steer.similarity == similarity
    assert steer.vector[0, 3] > 0.95
    assert found.best.valid.f1 == found.best.train.f1 == 1.0
    assert [one.layer for one in found.layers] == [1, 2]
    assert found.layers[1].threshold.valid.balanced_f1 < 0.9


def test_the_sides_may_be_unequal_and_still_count_alike() -> None:
    """Always holding would have F1 0.95 here."""
    found = fit_toy(words(BAD, 100, 1), words(GOOD, 10, 2))
    assert found.steer.layers == (1,) and found.best.valid.f1 == 1.0
    rare = fit_toy(words(BAD, 6, 1), words(GOOD, 120, 2))
    assert rare.steer.layers == (1,) and rare.best.valid.f1 == 1.0
    assert (rare.best.valid.positives, rare.best.valid.negatives) == (2, 36)


def test_a_condition_on_any_token_finds_a_letter_inside() -> None:
    """Positive words have one planted letter, anywhere but at their end."""
    positive = [w[:j] + "BH"[j % 2] + w[j:] for w in words(GOOD, 12, 1, GOOD) for j in (0, 2, 3)]
    negative = words(GOOD, 36, 2, GOOD)
    anywhere = fit_toy(positive, negative, tokens="any", similarity="dot")
    assert anywhere.steer.layers == (1,) and anywhere.steer.tokens == "any"
    assert anywhere.best.valid.f1 == 1.0 and anywhere.steer.side == "above"
    with pytest.raises(SteerError, match="no layer tells the prompts that are held out apart"):
        fit_toy(positive, negative, layers=[0])


@pytest.mark.parametrize("tokens", ["last", "any"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "cast"])
def test_figures_are_those_of_the_condition_on_the_prompts(tokens: Any, similarity: Any) -> None:
    """Each prompt is run with a gated steer, and its verdict read off the logits."""
    positive = [sample.text[:40] for sample in corpus.generate(12, seed=3, language="fr")]
    negative = [sample.text[:40] for sample in corpus.generate(15, seed=4, language="en")]
    options = {"tokens": tokens, "similarity": similarity, "seed": 2}
    found = fit_condition(tiny_model(), tiny_tokenizer(), positive, negative, **options)
    model, steers = tiny_model(), {"h": found.steer}
    steers["s"] = VectorSteer(vectors=torch.ones(1, HIDDEN), layers=(LAYERS - 1,))
    parts = split(positive, negative, valid_share=0.3, seed=2)
    counts = {"train": [0, 0], "valid": [0, 0]}
    for number, (text, label) in enumerate(zip(parts.texts, parts.is_positive, strict=True)):
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with hf.steered(model, {"s": {"strength": 9, "when": "h"}}, steers):
            steered = model(ids).logits[0, -1]
        if not torch.equal(steered, model(ids).logits[0, -1]):
            part = "train" if number < parts.num_train else "valid"
            counts[part][0 if label else 1] += 1
    best = found.best
    for part, figures in (("train", best.train), ("valid", best.valid)):
        assert [figures.true_positives, figures.false_positives] == counts[part]


def test_the_direction_is_the_difference_of_the_means_of_the_training_prompts() -> None:
    positive, negative = words(BAD, 9, 1), words(GOOD, 11, 2)
    found = fit_toy(positive, negative, layers=[1], seed=7)
    parts = split(positive, negative, valid_share=0.3, seed=7)
    table = Toy().layers[1].table.double()
    train = list(zip(parts.texts, parts.is_positive, strict=True))[: parts.num_train]
    means = [
        torch.stack([table[ord(text[-1])] for text, label in train if label == side]).mean(0)
        for side in (True, False)
    ]
    expected = means[0] - means[1]
    expected = expected / expected.norm()
    torch.testing.assert_close(found.steer.vector[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["dim", "logistic", "pca"])
def test_the_probes_of_concepts_make_directions_too(direction: Any) -> None:
    found = fit_toy(words(BAD, 20, 1), words(GOOD, 20, 2), direction=direction)
    assert found.steer.layers == (1,) and found.best.valid.f1 == 1.0
    torch.testing.assert_close(found.steer.vector.norm(), torch.tensor(1.0))


def test_equal_seeds_give_equal_conditions_and_the_split_depends_on_the_seed() -> None:
    sides = words(BAD, 20, 1), words(GOOD, 20, 2)
    first, again = (fit_toy(*sides, seed=4).steer for _ in range(2))
    assert torch.equal(first.vector, again.vector) and first.threshold == again.threshold
    assert (
        split(*sides, valid_share=0.3, seed=4).texts != split(*sides, valid_share=0.3, seed=5).texts
    )


def test_a_split_holds_out_a_share_of_each_side() -> None:
    parts = split(words(BAD, 10, 1), words(GOOD, 40, 2), valid_share=0.2, seed=0)
    held_out = parts.is_positive[parts.num_train :]
    assert held_out.tolist() == [True] * 2 + [False] * 8
    assert len(set(parts.texts)) == 50
    small = split(["a", "b", "c", "d", "d"], ["e", "f", "g", "h"], valid_share=0.9, seed=0)
    assert small.num_train == 4 and len(small.texts) == 8


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (["a", "b", "c", "c"], ["d", "e", "f", "g"], "3 positive and 4 negative prompts"),
        (["a", "b", "c", "d"], ["d", "e", "f", "g"], "prompt 'd' is on both sides"),
        ([], ["d", "e", "f", "g"], "0 positive and 4 negative prompts"),
    ],
)
def test_too_few_or_ambiguous_prompts_are_refused(
    positive: list[str], negative: list[str], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        fit_toy(positive, negative)


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_a_share_that_leaves_no_prompts_to_a_part_is_refused(share: float) -> None:
    with pytest.raises(SteerError, match="valid_share is"):
        fit_toy(words(BAD, 8, 1), words(GOOD, 8, 2), valid_share=share)


def scores(above: list[float], labels: str, below: list[float] | None = None) -> Scores:
    positive = np.array([letter == "+" for letter in labels])
    lowest = above if below is None else below
    return Scores(np.array(above), np.array(lowest), positive)


def test_a_threshold_lies_in_the_middle_of_the_widest_gap_that_tells_apart() -> None:
    threshold = best_threshold(scores([1, 2, 8, 9], "--++"), scores([3, 6], "-+"))
    assert threshold is not None
    assert (threshold.value, threshold.side) == (4.5, "above")
    assert threshold.valid.f1 == threshold.train.f1 == 1.0
    assert threshold.margin == pytest.approx(3 / 8)


def test_a_condition_holds_below_where_positive_prompts_score_low() -> None:
    threshold = best_threshold(scores([1, 2, 8, 9], "++--"), scores([0, 7], "+-"))
    assert threshold is not None
    assert (threshold.value, threshold.side) == (4.5, "below")


def test_figures_count_what_holds() -> None:
    """At 2.5 the held-out prompts 3, 4 and 5 hold, of which 4 and 5 are positive."""
    train = scores([2, 3], "-+")
    valid = scores([0, 1, 2, 3, 4, 5], "+---++")
    threshold = best_threshold(train, valid)
    assert threshold is not None and threshold.value == 3.5  # 2 of 3 positive, no negative
    figures = threshold.valid
    assert (figures.true_positives, figures.false_positives) == (2, 0)
    assert (figures.precision, figures.recall) == (1.0, pytest.approx(2 / 3))
    assert figures.f1 == pytest.approx(0.8) == figures.balanced_f1


def test_the_sides_of_a_threshold_have_scores_of_their_own() -> None:
    above = [5.0, 6, 1, 2]
    below = [0.0, 0, 0, 0]
    threshold = best_threshold(scores(above, "++--", below), scores(above, "++--", below))
    assert threshold is not None and threshold.side == "above" and threshold.value == 3.5
    assert best_threshold(scores(below, "++--"), scores(below, "++--")) is None


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 12, size=(2, 40)).astype(float)
    labels = generator.random((2, 40)) < 0.3
    train, valid = (Scores(v, v, y) for v, y in zip(values, labels, strict=True))
    best = best_threshold(train, valid)
    assert best is not None
    found = []
    for cut in np.arange(values.min() + 0.5, values.max()):
        for holds in (values[1] > cut, values[1] < cut):
            recall = (holds & labels[1]).sum() / labels[1].sum()
            rate = (holds & ~labels[1]).sum() / (~labels[1]).sum()
            found.append(2 * recall / (recall + rate + 1))
    assert best.valid.balanced_f1 == pytest.approx(max(found))


def test_a_prompt_is_read_with_special_tokens_or_in_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer("A dog.")["input_ids"]
    assert encode_prompt(tokenizer, "A dog.", max_length=64) == plain
    assert encode_prompt(tokenizer, "A dog.", max_length=2) == plain[-2:]
    chat = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = None
    with pytest.raises(SteerError, match="the tokenizer has no chat template"):
        encode_prompt(chat, "A dog.", max_length=64, chat_template=True)
    chat.chat_template = "{{ bos_token }}{% for m in messages %}({{ m.content }}){% endfor %}{% if add_generation_prompt %}!{% endif %}"  # noqa: E501
    expected = chat(f"{chat.bos_token}(A dog.)!", add_special_tokens=False)["input_ids"]
    assert encode_prompt(chat, "A dog.", max_length=64, chat_template=True) == expected
    chat.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(SteerError, match="the chat template does not take it"):
        encode_prompt(chat, "A dog.", max_length=64, chat_template=True)


def prompts_of(language: str, count: int) -> list[str]:
    return [sample.text for sample in corpus.generate(count, seed=8, language=language)]


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["fit", "condition", *map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    paths = folder / "fr.txt", folder / "en.jsonl"
    paths[0].write_text("\n".join(prompts_of("fr", 40)), encoding="utf-8")
    rows = [json.dumps({"text": text}) for text in prompts_of("en", 40)]
    paths[1].write_text("\n".join(rows), encoding="utf-8")
    return paths


@pytest.mark.parametrize("tokens", ["last", "any"])
def test_the_command_writes_a_condition_with_its_figures(
    files: tuple[Path, Path], tmp_path: Path, tokens: str
) -> None:
    output = tmp_path / "french.safetensors"
    result = run(
        "embedded", output, "--positive", files[0], "--negative", files[1], "--json",
        "--tokens", tokens, "--description", "French prompts",
    )  # fmt: skip
    data, steer = json.loads(result.stdout), load_steer(output)
    assert data["kind"] == steer.kind == "condition"
    assert (data["layer"],) == steer.layers and data["threshold"] == steer.threshold
    assert data["tokens"] == steer.tokens == tokens and data["side"] == steer.side
    assert data["valid"]["f1"] > 0.8 and data["valid"]["positive_prompts"] == 12
    assert str(data["layer"]) in data["by_layer"]
    assert steer.recipe["method"] == "condition"
    assert steer.recipe["figures"]["valid"] == data["valid"]
    assert steer.recipe["settings"]["seed"] == 0 and len(steer.recipe["data"]) == 2
    assert steer.description == "French prompts" and steer.base_model == "vllm-steer/embedded"
    table = run("embedded", output, "--positive", files[0], "--negative", files[1], "--force")
    assert "condition at resid of layer" in table.stdout and "precision" in table.stdout


def test_the_command_takes_labelled_prompts_and_warns_of_few(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    rows = [
        json.dumps({"text": text, "label": language})
        for language in ("fr", "en")
        for text in prompts_of(language, 12)
    ]
    data.write_text("\n".join(rows), encoding="utf-8")
    result = run(
        "embedded", tmp_path / "out.safetensors", "--data", data, "--labels", "fr=1,en=-1",
        "--layers", "2-3", "--valid-share", 0.25,
    )  # fmt: skip
    assert "held out are 3 positive and 3 negative prompts" in result.stderr
    with pytest.raises(SteerError, match="give --positive and --negative, or --data"):
        run("embedded", tmp_path / "other.safetensors", "--positive", data)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_states_are_reduced_without_the_padding_of_a_batch(batch_size: int) -> None:
    texts = ["The hotel was wonderful.", "A scandal.", "We were let down by it, badly!"]
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    kept = [[len(ids[0]) - 1], [0, 2], range(1, len(ids[2]))]
    prompts = [SelectedTokens(*pair) for pair in zip(ids, kept, strict=True)]
    options: dict[str, Any] = {"site": "resid", "batch_size": batch_size}
    means = list(mean_states(tiny_model(), prompts, layers=(0, 1), **options))
    conditions = [
        ConditionSteer(vector=torch.ones(1, HIDDEN), layers=(layer,), threshold=0.0)
        for layer in (0, 1)
    ]
    extremes = list(similarity_extremes(tiny_model(), prompts, conditions, batch_size=batch_size))
    for one, positions, mean, found in zip(ids, kept, means, extremes, strict=True):
        states = tiny_model()(torch.tensor([one]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            x = states[layer + 1][0]
            expected = x[list(positions)].mean(0)
            torch.testing.assert_close(mean[layer], expected, rtol=1e-12, atol=1e-12)
            cosines = x.sum(-1) / (x.norm(dim=-1) * HIDDEN**0.5)
            assert found[layer][0] == pytest.approx(float(cosines.min()), abs=1e-12)
            assert found[layer][1] == pytest.approx(float(cosines.max()), abs=1e-12)
