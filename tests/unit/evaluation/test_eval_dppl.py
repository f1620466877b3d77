"""dPPL, compared with another computation of its definition; lists of strengths in Hugging Face."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, hf
from vllm_steer.evaluation.composition import dppl
from vllm_steer.evaluation.composition.dppl import GoldAnswer, PromptPair
from vllm_steer.models import LanguageModel, load_language_model

PROMPT = "The hotel was"
STEPS = 6
HISTORY = [1.5, 0.0, 0.25, 2.0]


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    return load_language_model("embedded", dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def steers() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head = {"projector1": normal(2, 128, 3), "projector2": normal(2, 128, 3)}
    vectors = normal(2, 128)
    return {
        "delta": DeltaSteer(delta=normal(STEPS, 2, 128) / 4, layers=(0, 2)),
        "vector": VectorSteer(vectors=vectors, layers=(1, 3), site="resid", mode="add"),
        "head": LMSteer(
            variant="multiply", hidden_size=128, epsilon=1e-2, fixed_columns=(1,), **head
        ),
    }


def logits(language: LanguageModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return language.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def steered_logits(
    language: LanguageModel, tokens: list[int], length: int, strengths: Any, steers: Any
) -> torch.Tensor:
    with hf.steered(language.model, strengths, steers, prompt_length=length):
        return logits(language, tokens)


@pytest.fixture(scope="module")
def tokens(language: LanguageModel) -> list[int]:
    result: list[int] = language.tokenizer(PROMPT + " clean and quiet. I liked it")["input_ids"]
    return result


def test_a_deltas_listed_strengths_scale_its_steps(
    language: LanguageModel, steers: Any, tokens: list[int]
) -> None:
    scale = torch.tensor([*HISTORY, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    scaled = DeltaSteer(delta=steers["delta"].delta * scale, layers=(0, 2))
    expected = steered_logits(language, tokens, 4, {"d": 1.0}, {"d": scaled})
    result = steered_logits(language, tokens, 4, {"delta": {"strength": HISTORY}}, steers)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert not torch.equal(result, logits(language, tokens))


def test_a_vectors_listed_strengths_are_a_delta_of_its_direction(
    language: LanguageModel, steers: Any, tokens: list[int]
) -> None:
    rows = torch.tensor(HISTORY, dtype=torch.float64)[:, None, None] * steers["vector"].vectors
    delta = DeltaSteer(delta=rows, layers=(1, 3), site="resid")
    expected = steered_logits(language, tokens, 4, {"d": 1.0}, {"d": delta})
    result = steered_logits(language, tokens, 4, {"vector": {"strength": HISTORY}}, steers)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_at_the_head_each_token_has_the_logits_of_its_own_strength(
    language: LanguageModel, steers: Any, tokens: list[int]
) -> None:
    result = steered_logits(language, tokens, 4, {"head": {"strength": HISTORY}}, steers)
    expected = logits(language, tokens)
    for step, strength in enumerate(HISTORY):
        if strength:  # at 0 a token is left alone, the column that is always 1 too
            row = steered_logits(language, tokens, 4, {"head": strength}, steers)
            expected[3 + step] = row[3 + step]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("strengths", [[], [1.0, float("nan")], ["much"]])
def test_a_value_that_is_not_a_list_is_refused(
    language: LanguageModel, steers: Any, strengths: Any
) -> None:
    with (
        pytest.raises(SteerError, match="steer delta"),
        hf.steered(language.model, {"delta": {"strength": strengths}}, steers),
    ):
        pass


def test_a_list_has_no_schedule(language: LanguageModel, steers: Any) -> None:
    strengths = {"delta": {"strength": [1.0], "schedule": "dim"}}
    with (
        pytest.raises(SteerError, match="does not allow phase or schedule"),
        hf.steered(language.model, strengths, steers),
    ):
        pass


def test_the_gold_answer_is_the_greedy_one_with_its_own_perplexity(language: LanguageModel) -> None:
    gold = dppl.gold_answer(language, PromptPair(PROMPT, "-"), 5)
    row: list[int] = language.tokenizer(PROMPT)["input_ids"]
    costs = []
    for _ in range(5):
        result = logits(language, row)[-1].log_softmax(-1)
        row.append(int(result.argmax()))
        costs.append(-float(result.max()))
    assert list(gold.tokens) == row[-5:]
    assert gold.perplexity == pytest.approx(math.exp(sum(costs) / 5), rel=1e-9)
    assert language.tokenizer.decode(row) == language.tokenizer.decode(row[:-5]) + gold.text


@pytest.mark.parametrize("known", [None, HISTORY], ids=["fixed", "dynamic"])
def test_the_steered_perplexity_reads_the_answer_under_the_strengths(
    language: LanguageModel, steers: Any, known: Any
) -> None:
    example = PromptPair("-", PROMPT)
    gold = GoldAnswer((50, 60, 70, 80, 90, 100), "", 1.0)
    dose = {"strength": "dynamic", "max": 2} if known else {"strength": 1.5, "schedule": "dim"}
    result = dppl.steered_perplexity(
        language, example, gold, {"delta": dose}, steers, known and {"delta": tuple(known)}
    )
    prompt: list[int] = language.tokenizer(PROMPT)["input_ids"]
    read = gold.tokens[: len(known)] if known else gold.tokens
    # Token by token without a cache, every strength so far in a delta of its own.
    a = known or [1.5 * (1 - i / STEPS) for i in range(STEPS)]
    scaled = steers["delta"].delta.clone()
    scaled *= torch.tensor([*a, *[0.0] * (STEPS - len(a))])[:, None, None]
    delta = {"d": DeltaSteer(delta=scaled, layers=(0, 2))}
    cost = 0.0
    for i, token in enumerate(read):
        row = [*prompt, *gold.tokens[:i]]
        last = steered_logits(language, row, len(prompt), {"d": 1.0}, delta)[-1]
        cost -= float(last.log_softmax(-1)[token])
    assert result == pytest.approx(math.exp(cost / len(read)), rel=1e-6)


def test_without_a_steer_the_steered_perplexity_is_the_plain_prompts(
    language: LanguageModel,
) -> None:
    gold = dppl.gold_answer(language, PromptPair(PROMPT, PROMPT), 5)
    assert dppl.steered_perplexity(
        language, PromptPair(PROMPT, PROMPT), gold, {}, {}
    ) == pytest.approx(gold.perplexity, rel=1e-12)


def test_a_free_generation_of_no_token_has_no_perplexity(
    language: LanguageModel, steers: Any
) -> None:
    dose = {"delta": {"strength": "dynamic"}}
    gold = GoldAnswer((50,), "", 1.0)
    result = dppl.steered_perplexity(
        language, PromptPair("-", PROMPT), gold, dose, steers, {"delta": ()}
    )
    assert math.isnan(result)


def test_mean_and_median_are_over_examples_with_the_properties() -> None:
    golds = [GoldAnswer((1,), "", 2.0)] * 5
    steered = [3.0, 4.0, 102.0, 1000.0, math.nan]
    result = dppl.figures(steered, golds, [True, True, True, False, True])
    assert result == {"mean": pytest.approx(103 / 3), "median": 2.0, "examples": 3, "of": 5}
    none = dppl.figures(steered, golds, [False] * 5)
    assert math.isnan(none["mean"]) and math.isnan(none["median"]) and none["examples"] == 0


def test_examples_are_grouped_rows_or_prompts_as_they_stand(tmp_path: Path) -> None:
    rows = [{"input": f"i{n}", "output": f"o{n}"} for n in range(5)]
    grouped, plain = tmp_path / "g.jsonl", tmp_path / "p.jsonl"
    grouped.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text(json.dumps({"icl": "some\nmore", "prompt": "more"}) + "\n")
    assert dppl.read_icl(grouped, 1, "Do.") == [
        PromptPair("Do.\nQ:i0\nA:o0\n\nQ:i1\nA:", "Q:i1\nA:"),
        PromptPair("Do.\nQ:i2\nA:o2\n\nQ:i3\nA:", "Q:i3\nA:"),
    ]
    assert dppl.read_icl(plain, 4, "") == [PromptPair("some\nmore", "more")]
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(SteerError, match=r"e\.jsonl: the file has no rows"):
        dppl.read_icl(tmp_path / "e.jsonl", 1, "")


def test_a_prompt_too_long_for_an_answer_is_named(language: LanguageModel) -> None:
    with pytest.raises(SteerError, match=r"fit the \d+ of embedded; give fewer demonstrations"):
        dppl.gold_answer(language, PromptPair("word " * 3000, "-"), 5)
