"""``vllm-steer fit low-rank`` on the embedded model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_steer import SteerError, hf, load_steer
from vllm_steer.cli import app
from vllm_steer.digest import file_digest
from vllm_steer.embedded import corpus
from vllm_steer.models import load_language_model

SMALL = ("--steps", "2", "--batch-size", "4", "--rank", "2")


def run(*arguments: Any) -> Any:
    """The command in this process; a refusal is raised."""
    result = CliRunner().invoke(app, ["fit", "low-rank", "embedded", *map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path, count: int = 12) -> Path:
    """French reviews after headings that say no language."""
    samples = corpus.generate(count, seed=4, language="fr")
    rows = [
        {"prompt": corpus.OPEN_PROMPTS[i % len(corpus.OPEN_PROMPTS)], "completion": f" {one.text}"}
        for i, one in enumerate(samples)
    ]
    return write(path, rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return answers(tmp_path / "answers.jsonl")


def test_a_map_fitted_to_french_answers_makes_the_model_answer_in_french(tmp_path: Path) -> None:
    output = tmp_path / "french.safetensors"
    rows = answers(tmp_path / "rows.jsonl", 40)
    settings = ("--steps", 20, "--batch-size", 8, "--learning-rate", 0.02, "--max-length", 24)
    figures = json.loads(run(output, "--data", rows, *settings, "--json").stdout)
    assert figures["valid_loss_after"] < figures["valid_loss_before"] - 0.02
    steer, small = load_steer(output), load_language_model("embedded")
    words = {0.0: ("The ",), 1.0: ("Le ", "La ", "L'", "Les ")}
    for strength, beginnings in words.items():
        for heading in corpus.OPEN_PROMPTS[:3]:
            prompt = small.tokenizer(heading, return_tensors="pt")
            with hf.steered(small.model, {"french": strength}, {"french": steer}):
                ids = small.model.generate(**prompt, max_new_tokens=6, do_sample=False)
            answer = small.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :]).strip()
            assert answer.startswith(beginnings), (strength, heading, answer)


def test_the_file_records_how_it_was_made(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.safetensors"
    windows = '{"prompt": [":7", "-7:"]}'
    options = ("--layers", "1,3", "--site", "attn_out", "--parameterization", "direft")
    described = ("--default-strength", 1, "--description", "in French")
    result = run(output, "--data", data, *SMALL, *options, "--phase", windows, *described)
    assert 'requests give too: "phase": {"prompt": [":7", "-7:"]}' in result.stdout
    assert "held-out loss per token: " in result.stdout and "(1 texts)" in result.stdout
    steer = load_steer(output)
    assert (steer.layers, steer.site, steer.rank) == ((1, 3), "attn_out", 2)
    assert (steer.default_strength, steer.description) == (1.0, "in French")
    assert steer.base_model == "vllm-steer/embedded"
    recipe = steer.recipe
    assert (recipe["method"], recipe["model"]) == ("low-rank", "embedded")
    assert recipe["data"] == [{"file": "answers.jsonl", "sha256": file_digest(data)}]
    assert recipe["settings"]["phase"] == {"prompt": [":7", "-7:"]}
    assert recipe["settings"]["layers"] == [1, 3]
    assert recipe["figures"]["train_texts"] == 11
    assert sorted(path.name for path in (tmp_path / "map.safetensors.run").iterdir()) == [
        "loss.csv"
    ]


def test_texts_have_labels_as_strengths_and_those_of_0_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"text": one.text, "language": name}
        for name in ("fr", "en", "de")
        for one in corpus.generate(3, seed=2, language=name)
    ]
    texts = write(tmp_path / "texts.jsonl", rows)
    labels = ("--label-field", "language", "--labels", "fr=1,en=-1,de=0")
    shared = ("--texts", texts, *SMALL, "--parameterization", "lm-steer", "--valid-share", 0)
    figures = json.loads(run(tmp_path / "two", *shared, *labels, "--json").stdout)
    assert (figures["train_texts"], figures["valid_texts"]) == (6, 0)
    assert figures["kind"] == "low_rank" and list(figures["norm"]) == ["2"]
    assert load_steer(tmp_path / "two").bias is None
    one_sided = json.loads(run(tmp_path / "one", *shared, "--json").stdout)
    assert one_sided["train_texts"] == 9
    assert not torch.equal(load_steer(tmp_path / "one").a, load_steer(tmp_path / "two").a)


def test_a_plot_of_the_losses_is_drawn(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--plot", "--run-folder", tmp_path / "run", "--chat-template")
    run(tmp_path / "map", "--data", data, *SMALL, *options)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"loss.csv", "loss.png"}
    lines = (tmp_path / "run" / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss" and len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data, prompts with answers, or --texts, and only one of these"),
        (["--data", "DATA", "--texts", "DATA"], "and only one of these"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--texts", "DATA"], "answers.jsonl:1: the field 'text' is missing"),
        (["--data", "DATA", "--text-field", "x"], "--text-field does not apply with --data"),
        (["--texts", "DATA", "--phase", "last"], "--phase does not apply with --texts"),
        (["--data", "DATA", "--labels", "a=1"], "labels maps the values of a label field; name"),
        (["--data", "DATA", "--label-field", "y"], "answers.jsonl:1: the field 'y' is missing"),
        (["--data", "DATA", "--phase", "{"], "--phase is not JSON"),
        (["--data", "DATA", "--phase", '{"answer": "-2:"}'], "indices from 0"),
        (["--data", "DATA", "--rank", "129"], "rank is 129; the site resid of this model is 128"),
        (["--data", "DATA", "--layers", "4"], "layer 4 does not exist"),
        (["--data", "DATA", "--steps", "0"], "steps is 0; expected at least 1"),
        (["--data", "DATA", "--default-strength", "nan"], "default_strength is nan"),
    ],
)
def test_a_refusal_writes_nothing(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    options = [str(data) if argument == "DATA" else argument for argument in arguments]
    with pytest.raises(SteerError, match=message):
        run(tmp_path / "steer", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_an_existing_output_is_replaced_only_by_force(data: Path, tmp_path: Path) -> None:
    (tmp_path / "steer").write_text("kept")
    with pytest.raises(SteerError, match="exists already; choose another name, or give --force"):
        run(tmp_path / "steer", "--data", data, *SMALL)
    assert (tmp_path / "steer").read_text() == "kept"
    run(tmp_path / "steer", "--data", data, *SMALL, "--force")
    assert load_steer(tmp_path / "steer").rank == 2
