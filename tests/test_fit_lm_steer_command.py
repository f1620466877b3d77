"""``vllm-steer fit lm-steer``: from a user's files to a steer that works, and each refusal."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from typer.testing import CliRunner

from vllm_steer import LMSteer, SteerError, load_steer
from vllm_steer.cli import app
from vllm_steer.digest import file_digest
from vllm_steer.embedded import corpus, lexicon
from vllm_steer.models import load_language_model

STRENGTHS = (-5, -2, 0, 2, 5)
SMALL = ("--rank", "4", "--epsilon", "0.01", "--steps", "3", "--batch-size", "4")
ROWS = (
    {"text": "The hotel was wonderful.", "label": 1},
    {"text": "The flat was terrible.", "label": -1},
    {"text": "The film was great!", "label": 0.5},
)


def run(*arguments: Any) -> Any:
    """The command in this process; a refusal is raised."""
    result = CliRunner().invoke(app, ["fit", "lm-steer", "embedded", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_rows(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "texts.jsonl")


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> LMSteer:
    """Fitted as the page of the documents does it."""
    folder = tmp_path_factory.mktemp("sentiment")
    texts = [sys.executable, "-m", "vllm_steer.embedded.sample_texts", "reviews.jsonl"]
    fit = [sys.executable, "-c", "from vllm_steer.cli import main; main()", "fit", "lm-steer"]
    options = "--data reviews.jsonl --label-field sentiment --labels positive=1,negative=-1"
    settings = "--rank 32 --epsilon 0.01 --steps 80 --max-length 48"
    for line in (texts, [*fit, "embedded", "s.safetensors", *f"{options} {settings}".split()]):
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run(line, cwd=folder, env=environment, check=True, timeout=300)
    steer = load_steer(folder / "s.safetensors")
    assert isinstance(steer, LMSteer)
    return steer


def positive_shares(steer: LMSteer) -> list[float]:
    """Of texts after neutral openings, at each of the strengths."""
    loaded = load_language_model("embedded")
    return [
        lexicon.positive_share(
            measure.sample(
                loaded.model,
                loaded.tokenizer,
                {"s": strength},
                {"s": steer},
                prompts=corpus.NEUTRAL_PROMPTS,
                new_tokens=24,
            )
        )
        for strength in STRENGTHS
    ]


def random_like(steer: LMSteer) -> LMSteer:
    """Random projectors whose product has the norm of the steer's, column by column."""
    generator = torch.Generator().manual_seed(0)
    shape = steer.projector1.shape
    first, second = torch.randn((2, *shape), generator=generator)
    norms = (steer.projector1 @ steer.projector2.mT).norm(dim=(1, 2))
    scale = norms / (first @ second.mT).norm(dim=(1, 2))
    return dataclasses.replace(steer, projector1=first * scale[:, None, None], projector2=second)


def test_sentiment_follows_the_strength(sentiment: LMSteer) -> None:
    shares = positive_shares(sentiment)
    assert shares == sorted(shares), shares
    assert shares[0] < 0.2
    assert shares[-1] > 0.8


def test_a_random_steer_of_equal_norm_does_not_change_sentiment(sentiment: LMSteer) -> None:
    shares = positive_shares(random_like(sentiment))
    assert max(shares) - min(shares) < 0.2, shares


def test_the_file_records_how_it_was_made(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    options = ("--default-strength", "3", "--description", "kind words", "--train-on-padding")
    run(output, "--data", data, *SMALL, *options)
    steer = load_steer(output)
    assert (steer.default_strength, steer.description) == (3.0, "kind words")
    assert steer.base_model == "embedded"
    recipe = steer.recipe or {}
    assert recipe["data"] == [{"file": "texts.jsonl", "sha256": file_digest(data)}]
    assert recipe["model"] == "embedded"
    assert recipe["settings"]["mask_padding"] is False
    assert recipe["settings"]["steps"] == 3
    assert recipe["figures"]["texts"] == 3
    assert {"torch", "transformers", "vllm-steer"} == set(recipe["versions"])


@pytest.mark.parametrize("variant", ["multiply", "add", "offset"])
def test_every_variant_works_with_and_without_a_dummy(
    data: Path, tmp_path: Path, variant: str
) -> None:
    run(tmp_path / "s", "--data", data, *SMALL, "--variant", variant, "--no-dummy")
    steer = load_steer(tmp_path / "s")
    assert (steer.variant, steer.columns, steer.fixed_columns) == (variant, 1, ())


def test_figures_go_to_standard_output_as_json(data: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "s.safetensors", "--data", data, *SMALL, "--json")
    figures = json.loads(result.stdout)
    recipe = load_steer(tmp_path / "s.safetensors").recipe or {}
    assert recipe["figures"].items() <= figures.items()
    assert figures["output"] == str(tmp_path / "s.safetensors")
    lines = (Path(figures["run_folder"]) / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss"
    assert float(lines[-1].split(",")[1]) == figures["final_loss"]


def test_two_files_are_the_two_labels(tmp_path: Path) -> None:
    positive, negative = tmp_path / "good.txt", tmp_path / "bad.txt"
    positive.write_text("The hotel was wonderful.\nThe film was great!\n")
    negative.write_text("The flat was terrible.\n")
    run(tmp_path / "two", "--positive", positive, "--negative", negative, *SMALL)
    rows = [{"text": t, "label": 1} for t in positive.read_text().splitlines()]
    rows.append({"text": "The flat was terrible.", "label": -1})
    run(tmp_path / "one", "--data", write_rows(tmp_path / "one.jsonl", rows), *SMALL)
    one, two = load_steer(tmp_path / "one"), load_steer(tmp_path / "two")
    assert torch.equal(one.projector1, two.projector1)
    assert [file["file"] for file in (two.recipe or {})["data"]] == ["good.txt", "bad.txt"]


def test_the_loss_curve_is_drawn(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path / "s", "--data", data, *SMALL, "--plot", "--run-folder", tmp_path / "here")
    picture = (tmp_path / "here" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["loss.csv", "loss.png"]


def test_an_existing_file_is_only_replaced_by_force(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    output.write_text("old")
    with pytest.raises(SteerError, match=r"s.safetensors: exists already; choose another name"):
        run(output, "--data", data, *SMALL)
    assert output.read_text() == "old"
    run(output, "--data", data, *SMALL, "--force")
    assert load_steer(output).rank == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the texts as --data FILE, or as --positive FILE and --negative FILE"),
        (["--positive", "a.txt"], "give the texts as --data FILE"),
        (["--data", "missing.jsonl"], r"missing\.jsonl: no such file"),
    ],
)
def test_texts_that_are_not_given_are_an_error(
    tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        run(tmp_path / "s", *options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file has no rows"),
        ([*ROWS, {"text": "no label"}], r"texts.jsonl:4: the field 'label' is missing"),
        ([*ROWS, {"text": "far out", "label": 3}], r"texts.jsonl:4: label 3 is not a number in"),
        ([*ROWS, {"text": 5, "label": 1}], r"texts.jsonl:4: text is 5; expected a text"),
        ([ROWS[0]] * 3, "all 3 labels are 1; a fit needs texts with different labels"),
        ([{"text": "a", "label": y} for y in (0, 1)], "the labels are 0 and 1"),
    ],
    ids=["empty", "no label", "label out of range", "no text", "one label", "0 and 1"],
)
def test_bad_rows_are_errors_that_name_the_line(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        run(tmp_path / "s", "--data", write_rows(tmp_path / "texts.jsonl", rows))
    assert not (tmp_path / "s").exists()


def test_an_output_in_no_folder_is_refused_before_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"there is no folder .*nowhere; make it first"):
        run(tmp_path / "nowhere" / "s", "--data", data, *SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--default-strength", "nan"], "default_strength is nan; it must be finite"),
        (["--checkpoint-every", "0"], "checkpoint_every is 0; expected at least 1 step"),
        (["--cache-gib", "nan"], "cache-gib is nan; expected 0 or more"),
        (["--rank", "999999999"], "rank 999999999: there is no memory for the parameters"),
        (["--variant", "divide"], "variant is 'divide'; allowed: multiply, add, offset"),
    ],
)
def test_an_invalid_option_is_refused(
    data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        run(tmp_path / "s", "--data", data, *SMALL, *options)


def test_a_bad_setting_is_one_line_and_exit_code_1(data: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()", "fit", "lm-steer"]
    line += ["embedded", str(tmp_path / "s"), "--data", str(data), "--rank", "0"]
    process = subprocess.run(line, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "vllm-steer: rank is 0; expected at least 1\n"
