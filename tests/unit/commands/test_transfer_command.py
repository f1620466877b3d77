"""``vllm-steer transfer``: the file that it writes and the figures that it prints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_steer import SteerError, load_steer, save_steer
from vllm_steer.cli import app
from vllm_steer.embedded import STEERS, corpus

SISTER = Path(__file__).parents[2] / "models" / "sister"
SENTIMENT = STEERS / "sentiment.safetensors"


def transfer(output: Path, *options: Any, steer: Path = SENTIMENT) -> str:
    """The output of the command; raises its ``SteerError``."""
    line = ["transfer", steer, "embedded", SISTER, output, *options]
    result = CliRunner().invoke(app, list(map(str, line)))
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    samples = corpus.generate(8, seed=3, language="en")
    rows = [{"text": s.text, "label": 1 if s.sentiment == "positive" else -1} for s in samples]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_file_is_a_steer_of_the_target_with_its_recipe(tmp_path: Path) -> None:
    data = json.loads(transfer(tmp_path / "out.safetensors", "--json"))
    steer, original = load_steer(tmp_path / "out.safetensors"), load_steer(SENTIMENT)
    assert (steer.hidden_size, steer.fixed_columns, steer.rank) == (160, (1,), original.rank)
    assert (steer.epsilon, steer.base_model) == (original.epsilon, str(SISTER))
    assert steer.recipe["method"] == "transfer"
    assert steer.recipe["settings"]["source_model"] == "embedded"
    assert steer.recipe["figures"]["shared_tokens"] == data["shared_tokens"] > 1000
    assert 0 < data["fit"]["relative_residual"] < 1
    assert data["effect"] is None


def test_the_effect_is_measured_in_both_models(tmp_path: Path, labelled: Path) -> None:
    message = json.loads(transfer(tmp_path / "out", "--data", labelled, "--strength", 5, "--json"))
    source, target = message["effect"]["source"], message["effect"]["target"]
    assert source["texts"] == target["texts"] == 8
    share = target["evidence_per_text"] / source["evidence_per_text"]
    assert message["effect"]["kept"] == pytest.approx(share)
    recipe = load_steer(tmp_path / "out").recipe
    assert [data["file"] for data in recipe["data"]] == [SENTIMENT.name, labelled.name]
    assert recipe["settings"]["strength"] == 5


def test_the_recipe_of_the_steer_itself_is_kept(tmp_path: Path) -> None:
    recipe = {"method": "by hand", "settings": {"rank": 32}}
    save_steer(replace(load_steer(SENTIMENT), recipe=recipe), tmp_path / "mine")
    transfer(tmp_path / "out", steer=tmp_path / "mine")
    assert load_steer(tmp_path / "out").recipe["source"] == recipe


def test_matched_strength_is_written_into_epsilon(tmp_path: Path, labelled: Path) -> None:
    data = json.loads(transfer(tmp_path / "out", "--data", labelled, "--match-strength", "--json"))
    assert data["effect"]["kept"] == pytest.approx(1, rel=0.03)
    assert load_steer(tmp_path / "out").epsilon == data["epsilon"] > load_steer(SENTIMENT).epsilon


def test_the_table_says_how_well_it_fits(tmp_path: Path) -> None:
    output = transfer(tmp_path / "out")
    assert "shared tokens" in output and "mean cosine" in output


def test_an_existing_output_is_only_replaced_when_forced(tmp_path: Path) -> None:
    output = tmp_path / "own"
    output.write_text("precious")
    with pytest.raises(SteerError, match=r"own: exists already; choose another name, or give --fo"):
        transfer(output)
    assert output.read_text() == "precious"
    transfer(output, "--force", "--json")
    assert load_steer(output).hidden_size == 160


def test_an_invalid_output_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"there is no folder .*nowhere; make it first"):
        transfer(tmp_path / "nowhere" / "out", steer=tmp_path / "not-looked-at")
    with pytest.raises(SteerError, match="is not a regular file and cannot be replaced"):
        transfer(tmp_path, "--force", steer=tmp_path / "not-looked-at")


@pytest.mark.parametrize(
    ("options", "steer", "message"),
    [
        (["--match-strength"], "sentiment", "--match-strength needs labelled texts.*give --data"),
        (["--solver", "magic"], "sentiment", "solver is 'magic'; allowed: orthogonal"),
        ([], "french-vector", "of kind vector; only an LM-Steer can be transferred"),
    ],
    ids=["nothing to match by", "solver", "kind"],
)
def test_a_refused_transfer_leaves_no_output(
    tmp_path: Path, options: list[str], steer: str, message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        transfer(tmp_path / "out", *options, steer=STEERS / f"{steer}.safetensors")
    assert not list(tmp_path.iterdir())
