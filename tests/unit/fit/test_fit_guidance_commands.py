"""``vllm-steer fit concept``, ``vector`` and ``delta`` on the embedded model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_steer import SteerError, load_steer
from vllm_steer.cli import app
from vllm_steer.embedded import MODEL, corpus
from vllm_steer.fit import activations
from vllm_steer.models import load_language_model
from vllm_steer.steers.content import content_digest

ANSWERS = 240


def run(*arguments: Any) -> Any:
    """The command in this process; a refusal is raised."""
    result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(language: str, count: int) -> list[str]:
    return [sample.text for sample in corpus.generate(count, seed=11, language=language)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews in French (1) and English (0), after headings that say neither."""
    prompts = corpus.OPEN_PROMPTS
    rows = [
        {"prompt": prompts[i % len(prompts)], "completion": text, "label": label}
        for language, label in (("fr", 1), ("en", 0))
        for i, text in enumerate(reviews(language, ANSWERS // 2))
    ]
    return write(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"positive": positive, "negative": negative}
        for positive, negative in zip(reviews("fr", 12), reviews("en", 12), strict=True)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def test_a_language_is_a_concept_in_some_layer(answers: Path, tmp_path: Path) -> None:
    output = tmp_path / "french.safetensors"
    result = run(
        "concept", "embedded", output, "--data", answers, "--probe", "logistic", "--json",
        "--default-strength", 4, "--description", "towards French",
    )  # fmt: skip
    figures = json.loads(result.stdout)
    train, validation = figures["train_accuracy"], figures["validation_accuracy"]
    assert list(train) == list(validation) == ["0", "1", "2", "3"]
    assert max(train.values()) > 0.9 and max(validation.values()) > 0.9
    assert train["0"] < max(train.values()) - 0.1  # what a word is says less than its context
    assert figures["train_answers"] + figures["validation_answers"] == ANSWERS
    steer = load_steer(output)
    assert (steer.site, steer.mode, steer.layers) == ("attn_in", "rotate", (0, 1, 2, 3))
    assert steer.layer_scores == tuple(train.values())
    assert (steer.default_strength, steer.description) == (4.0, "towards French")
    assert steer.base_model == "vllm-steer/embedded"
    assert steer.recipe["settings"]["probe"] == "logistic"
    assert steer.recipe["data"][0]["file"] == "answers.jsonl"
    assert steer.recipe["figures"]["validation_accuracy"] == list(validation.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["french.safetensors"]


def test_the_first_row_is_shown_as_the_model_reads_it(answers: Path, tmp_path: Path) -> None:
    options = ["concept", "embedded", tmp_path / "f", "--data", answers, "--layers", 1]
    first = json.loads(answers.read_text().splitlines()[0])
    message = run(*options, "--top-k", 1, "--max-tokens", 3).stderr
    assert repr(f"<s>{first['prompt']} {first['completion']}") in message
    assert "(3 tokens)" in message
    plain = run(*options, "--no-chat-template", "--force").stderr
    assert repr(f"<s>Question: {first['prompt']}\nAnswer: {first['completion']}\n") in plain


def test_a_vector_of_labelled_texts_leaves_out_neutral_labels(tmp_path: Path) -> None:
    texts = [(language, text) for language in ("fr", "en", "de") for text in reviews(language, 4)]
    data = write(tmp_path / "all.jsonl", [{"text": t, "language": name} for name, t in texts])
    sides = {
        language: write(tmp_path / f"{language}.jsonl", [{"text": t} for t in reviews(language, 4)])
        for language in ("fr", "en")
    }
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    labels = ["--label-field", "language", "--labels", "fr=1,en=-1,de=0"]
    run("vector", "embedded", one, "--data", data, *labels, "--layers", "1-2")
    run("vector", "embedded", two, "--positive", sides["fr"], "--negative", sides["en"])
    assert load_steer(one).layers == (1, 2)
    assert torch.equal(load_steer(one).vectors, load_steer(two).vectors[1:3])
    language = load_language_model("embedded")
    means = []
    for name in ("fr", "en"):
        rows = activations(
            language.model, language.tokenizer, reviews(name, 4), site="resid", layers=(1,)
        )
        means.append(torch.cat(list(rows)).double().mean(0))
    expected = means[0] - means[1]
    torch.testing.assert_close(load_steer(one).vectors[:1].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_vector_of_pairs_by_pca(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.safetensors"
    options = ["--pairs", pairs, "--method", "pca", "--tokens", "last", "--mode", "rotate"]
    figures = json.loads(run("vector", "embedded", output, *options, "--json").stdout)
    assert figures["norm"] == {str(layer): pytest.approx(1.0, abs=1e-6) for layer in range(4)}
    assert (figures["positive_texts"], figures["negative_texts"]) == (12, 12)
    assert load_steer(output).mode == "rotate"


def test_the_same_seed_gives_the_same_steer(answers: Path, tmp_path: Path) -> None:
    options = ["--data", answers, "--layers", "1", "--probe", "pca"]
    steers = []
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        run("concept", "embedded", tmp_path / name, *options, "--seed", seed)
        steers.append(load_steer(tmp_path / name))
    one, two, three = steers
    assert content_digest(one) == content_digest(two) != content_digest(three)
    assert one.recipe == two.recipe


def test_a_delta_of_demonstrations(tmp_path: Path) -> None:
    files = {
        language: write(
            tmp_path / f"{language}.jsonl",
            [
                {"input": prompt, "output": text}
                for prompt, text in zip(corpus.OPEN_PROMPTS, reviews(language, 12), strict=True)
            ],
        )
        for language in ("fr", "en")
    }
    output = tmp_path / "d.safetensors"
    sides = ["--wanted", files["fr"], "--other", files["en"]]
    options = ["--icl-examples", 2, "--steps", 3, "--support", 5, "--layers", "1,3"]
    result = run("delta", "embedded", output, *sides, *options, "--schedule", "dim", "--json")
    steer = load_steer(output)
    assert (tuple(steer.delta.shape), steer.schedule) == ((3, 2, 128), "dim")
    figures = json.loads(result.stdout)
    assert (figures["steps"], figures["wanted_prompts"], figures["other_prompts"]) == (3, 5, 5)
    norms = steer.delta.double().norm(dim=2)
    assert figures["first_norm"] == {"1": norms[0, 0].item(), "3": norms[0, 1].item()}
    run("delta", "embedded", tmp_path / "all", *sides, "--icl-examples", 0, "--all", "--steps", 1)
    recipe = load_steer(tmp_path / "all").recipe
    assert recipe["figures"]["wanted_prompts"] == 12
    assert [data["file"] for data in recipe["data"]] == ["fr.jsonl", "en.jsonl"]


def test_a_delta_of_plain_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "w.jsonl", [{"text": "Bonjour,"}, {"text": "La chambre"}])
    other = write(tmp_path / "o.jsonl", [{"text": "Hello,"}])
    options = ["--wanted", path, "--other", other, "--plain", "--all", "--steps", 2]
    run("delta", MODEL, tmp_path / "d", *options)
    steer = load_steer(tmp_path / "d")
    assert steer.base_model == str(MODEL)
    assert steer.recipe["figures"] == {"steps": 2, "wanted_prompts": 2, "other_prompts": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["concept", "--data", "DATA", "--layers", "9"], "layer 9 does not exist"),
        (["concept", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["vector"], "give --pairs, or --positive and --negative, or --data"),
        (["vector", "--pairs", "DATA", "--data", "DATA"], "and only one of these"),
        (["vector", "--positive", "DATA"], "give --pairs"),
        (
            ["vector", "--positive", "DATA", "--negative", "DATA", "--text-field", "completion"],
            "the two sides do not differ in any layer, so the vector would be zero",
        ),
        (["concept", "--data", "DATA", "--top-k", "5"], "top_k is 5; there are 4 layers"),
        (["vector", "--pairs", "DATA"], "answers.jsonl:1: the field 'positive' is missing"),
        (
            ["delta", "--wanted", "DATA", "--other", "DATA"],
            "answers.jsonl:1: the field 'input' is missing",
        ),
        (
            ["delta", "--wanted", "DATA", "--other", "DATA", "--plain", "--instruction", "Do."],
            "--instruction does not apply with --plain",
        ),
        (
            ["delta", "--wanted", "DATA", "--other", "DATA", "--plain", "--icl-examples", "4"],
            "--icl-examples does not apply with --plain",
        ),
        (
            ["delta", "--wanted", "DATA", "--other", "DATA", "--all", "--support", "3"],
            "--support does not apply with --all",
        ),
        (["concept", "--data", "DATA", "--signed"], "signed means nothing for a dim probe"),
        (["delta", "--wanted", "DATA", "--other", "DATA", "--schedule", "x"], "schedule is 'x'"),
        (
            [
                "delta",
                "--wanted",
                "DATA",
                "--other",
                "DATA",
                "--input-field",
                "prompt",
                "--output-field",
                "completion",
                "--steps",
                "513",
            ],
            "steps is 513; the model reads 512 tokens, prompt and steps together: give fewer",
        ),
    ],
)
def test_a_refusal_writes_nothing(
    arguments: list[str], message: str, answers: Path, tmp_path: Path
) -> None:
    method, *options = (str(answers) if argument == "DATA" else argument for argument in arguments)
    with pytest.raises(SteerError, match=message):
        run(method, "embedded", tmp_path / "steer", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["concept", "vector", "delta"])
def test_an_existing_output_is_replaced_only_by_force(
    method: str, answers: Path, tmp_path: Path
) -> None:
    options = {
        "concept": ["--data", answers],
        "vector": ["--pairs", answers],
        "delta": ["--wanted", answers, "--other", answers],
    }[method]
    (tmp_path / "steer").write_text("kept")
    with pytest.raises(SteerError, match="exists already; choose another name, or give --force"):
        run(method, "embedded", tmp_path / "steer", *options)
    assert (tmp_path / "steer").read_text() == "kept"
    with pytest.raises(SteerError, match=r"there is no folder .*nowhere; make it first"):
        run(method, "embedded", tmp_path / "nowhere" / "steer", *options)


@pytest.mark.parametrize("output", ["", "folder", "pipe"])
def test_force_replaces_plain_files_only(output: str, answers: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    target = tmp_path / output if output else ""  # "" is the working folder
    with pytest.raises(
        SteerError, match="is not a regular file and cannot be replaced; choose another"
    ):
        run("vector", "embedded", target, "--pairs", answers, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe"}
    assert (tmp_path / "pipe").is_fifo()


def test_a_killed_process_leaves_the_old_file_unchanged(answers: Path, tmp_path: Path) -> None:
    output = tmp_path / "steer"
    output.write_text("the last good file")
    line = ["fit", "concept", "embedded", str(output), "--data", str(answers), "--force"]
    code = f"import sys; sys.argv[1:] = {line!r}; from vllm_steer.cli import main; main()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        begun = any("tokens used of it" in line for line in process.stderr)
        process.kill()  # while it reads answers
    assert begun
    assert process.returncode == -9
    assert output.read_text() == "the last good file"
    assert list(tmp_path.iterdir()) == [output]
