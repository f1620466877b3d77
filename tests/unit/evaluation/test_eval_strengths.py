"""Parsing of strengths, sampling settings and prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from outside import AUTHORS_PROMPTS, needs

from vllm_steer import SteerError
from vllm_steer.evaluation.prompts import read_prompts
from vllm_steer.evaluation.sampling import sampling_of
from vllm_steer.evaluation.strengths import parse_range, parse_strengths


@pytest.mark.parametrize(
    ("spec", "strengths"),
    [
        ("-5,-2,0,2,5", (-5, -2, 0, 2, 5)),
        ("5", (0, 5)),
        ("2,-1,2,0.5", (-1, 0, 0.5, 2)),
        ("-5:5:2.5", (-5, -2.5, 0, 2.5, 5)),
        ("5:-5:-5", (-5, 0, 5)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
        ("1:2:0.4", (0, 1, 1.4, 1.8)),
        ("1:3:1,-7", (-7, 0, 1, 2, 3)),
        ("1e2,-0", (0, 100)),
    ],
)
def test_a_list_and_a_range_always_have_zero(spec: str, strengths: tuple[float, ...]) -> None:
    assert parse_strengths(spec) == strengths
    assert "-0.0" not in str(parse_strengths(spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "strengths are ''; expected numbers such as"),
        ("1,,2", "strengths are '1,,2'; expected"),
        ("a", "strengths are 'a'; expected"),
        ("1:2", "strengths are '1:2'; expected"),
        ("1:2:0", "strengths are '1:2:0'; expected"),
        ("1:2:-1", "strengths are '1:2:-1'; expected"),
        ("nan", "strengths are 'nan'; expected numbers"),
        ("0:1e999:1", "each must be finite"),
        *((text, "expected numbers") for text in ("1_0", "\u0661", "\uff11", "\xa01", "0x1", "01")),
        ("0:1:1e-9", "are more than 1000; use a larger step"),
    ],
)
def test_other_strengths_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SteerError, match=message.replace("(", r"\(")):
        parse_strengths(spec)


def test_a_range_goes_away_from_zero() -> None:
    assert parse_range("0:10") == (0, 10)
    assert parse_range("-1:-10") == (-1, -10)
    for spec in ("10:0", "-1:1", "3:3"):
        with pytest.raises(SteerError, match="from a strength near 0 to one further away"):
            parse_range(spec)
    with pytest.raises(SteerError, match="two strengths such as '0:10'"):
        parse_range("0:5:1")


def test_the_authors_preset_is_their_settings() -> None:
    preset = sampling_of("lm-steer", {}).settings
    assert preset == {
        "samples": 25,
        "max_tokens": 20,
        "exact_length": True,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "seed": 0,
    }
    assert sampling_of("lm-steer", {"top_p": 1.0, "samples": None}).settings == {
        **preset,
        "top_p": 1.0,
    }


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("best", {}, "preset is 'best'; allowed: lm-steer"),
        (None, {"samples": 0}, "samples is 0; allowed: at least 1"),
        (None, {"max_tokens": 0}, "max_tokens is 0; allowed: at least 1"),
        (None, {"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        (None, {"temperature": float("nan")}, "temperature is nan; allowed: 0 or more"),
        (None, {"top_p": 0.0}, "top_p is 0.0; allowed: above 0, at most 1"),
        (None, {"top_k": -1}, "top_k is -1; allowed: 0"),
        (None, {"seed": -1}, "seed is -1; allowed: 0 to"),
        (None, {"seed": 2**63 - 25}, "seed is 9223372036854775783; allowed: 0 to"),
        (None, {"temperature": 0.0}, "temperature 0 always generates the same text"),
    ],
)
def test_sampling_out_of_range_is_refused(
    preset: str | None, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        sampling_of(preset, overrides)


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("p.jsonl", '{"prompt": {"text": "The food"}}\n{"prompt": {"text": "A man"}}\n', "prompt"),
        ("p.jsonl", '{"prompt": "The food"}\n\n{"prompt": "A man"}\n', "prompt"),
        ("p.json", '[{"begin": "The food"}, {"begin": "A man"}]', "begin"),
        ("p.txt", "The food\nA man\n", "prompt"),
    ],
)
def test_prompts_are_read_from_each_form(
    tmp_path: Path, name: str, content: str, field: str
) -> None:
    (tmp_path / name).write_text(content)
    prompts = read_prompts(tmp_path / name, field=field)
    assert prompts.texts == ("The food", "A man")
    assert read_prompts(tmp_path / name, field=field, count=1).texts == ("The food",)


def test_bad_prompts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"text": "no"}\n')
    with pytest.raises(
        SteerError, match=r"p\.jsonl:2: the field 'prompt' is missing; the row has 'text'"
    ):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(SteerError, match="the file has no prompts"):
        read_prompts(path)
    with pytest.raises(SteerError, match="the number of prompts is 0"):
        read_prompts(path, count=0)


@needs(AUTHORS_PROMPTS)
def test_the_authors_prompt_files_are_read() -> None:
    rows = [json.loads(line) for line in AUTHORS_PROMPTS.read_text().splitlines()]
    assert read_prompts(AUTHORS_PROMPTS).texts == tuple(row["prompt"]["text"] for row in rows)
