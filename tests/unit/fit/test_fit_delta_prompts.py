"""Prompts with demonstrations, and the drawing of prompts."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_model import HIDDEN, tiny_model, tiny_tokenizer

from vllm_steer import SteerError
from vllm_steer.fit import fit_delta
from vllm_steer.texts.icl import Example, icl_prompts, read_examples, support

ROWS = [Example(f"q{i}", f"a{i}") for i in range(8)]


def test_the_last_row_of_a_group_is_the_question_after_the_demonstrations() -> None:
    assert icl_prompts(ROWS, 2, instruction="Answer in French.") == [
        "Answer in French.\nQ:q0\nA:a0\n\nQ:q1\nA:a1\n\nQ:q2\nA:",
        "Answer in French.\nQ:q3\nA:a3\n\nQ:q4\nA:a4\n\nQ:q5\nA:",
    ]  # the last two rows are no whole group


def test_every_demonstration_of_a_group_is_shown() -> None:
    (prompt,) = icl_prompts(ROWS[:5], 4)
    assert prompt.count("\n\n") == 4  # the authors' loop shows three


def test_without_demonstrations_the_prompt_is_the_question() -> None:
    assert icl_prompts(ROWS[:2], 0) == ["Q:q0\nA:", "Q:q1\nA:"]


@pytest.mark.parametrize(
    ("demonstrations", "instruction", "message"),
    [
        (8, "", "the file has 8 rows; a prompt with 8 demonstrations needs 9"),
        (-1, "", "demonstrations is -1; expected 0 or more"),
        (0, "Be kind.", "1 or more with an instruction"),
    ],
)
def test_invalid_prompts_are_refused(demonstrations: int, instruction: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        icl_prompts(ROWS, demonstrations, instruction=instruction)


def test_both_sides_use_the_same_indices_drawn_with_replacement() -> None:
    positive = [f"w{i}" for i in range(5)]
    other = [f"o{i}" for i in range(7)]
    drawn = support(positive, other, 30, 32)
    random.seed(32)
    places = [random.randint(0, 4) for _ in range(30)]
    assert drawn == ([f"w{i}" for i in places], [f"o{i}" for i in places])
    assert len(set(places)) < 30


def test_examples_are_read_and_bad_rows_named(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text("question,answer\nWhy?,So.\nWhen?,Now.\n")
    result = read_examples(path, input_field="question", output_field="answer")
    assert result == [("Why?", "So."), ("When?", "Now.")]
    with pytest.raises(
        SteerError, match=r"qa.csv:2: the field 'input' is missing; the row has 'question'"
    ):
        read_examples(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; a delta has at least one"),
        ({"max_length": 3}, r"prompt 'The hotel was good' has \d tokens; 1 to 3 are allowed"),
        ({"steps": 62}, r"has \d tokens; 1 to 3 are allowed"),  # of a context of 64
    ],
)
def test_a_delta_that_cannot_be_fitted_is_refused(options: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        fit_delta(tiny_model(), tiny_tokenizer(), ["The hotel was good"], ["Well"], **options)


@pytest.mark.parametrize("site", ["attn_in", "resid", "attn_out", "heads"])
def test_a_delta_can_be_fitted_at_any_site(site: Any) -> None:
    prompts = ["The hotel was"], ["The flat"]
    steer = fit_delta(tiny_model(), tiny_tokenizer(), *prompts, steps=1, site=site, layers=[1])
    block = tiny_model().model.layers[1]
    module = {
        "attn_in": block.input_layernorm,
        "resid": block,
        "attn_out": block.self_attn,
        "heads": block.self_attn.o_proj,
    }[site]
    activations: list[torch.Tensor] = []

    def record(_module: Any, prompts_by_text: Any, output: Any) -> None:
        result = prompts_by_text[0] if site == "heads" else output
        activations.append((result[0] if isinstance(result, tuple) else result)[0, -1])

    hook = module.register_forward_hook(record)
    for (prompt,) in prompts:
        tiny_model()(torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]))
    hook.remove()
    assert steer.delta.shape == (1, 1, HIDDEN)
    positive = activations[0] - activations[1]
    torch.testing.assert_close(steer.delta[0, 0].double(), positive, rtol=1e-5, atol=1e-6)
