"""``vllm-steer sweep`` on the embedded model, in a separate process with a real engine."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import load_steer, save_steer
from vllm_steer.embedded import STEERS, corpus
from vllm_steer.evaluation.control import random_steer


def sweep(*arguments: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()", "sweep", "embedded"]
    completed = subprocess.run(
        [*line, *map(str, arguments), "--enforce-eager"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert completed.returncode == code, completed.stderr[-3000:]
    return completed


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(corpus.NEUTRAL_PROMPTS[:6]))
    return path


def test_a_bisection_finds_a_strength_and_writes_it(tmp_path: Path, prompts: Path) -> None:
    path = tmp_path / "sentiment.safetensors"
    before = load_steer(STEERS / path.name)
    save_steer(dataclasses.replace(before, recipe={"method": "fitted"}), path)
    completed = sweep(
        *(path, "--prompts", prompts, "--judge", "lexicon:embedded:sentiment", "--samples", 16),
        *("--range", "0:-40", "--rounds", 4, "--direction", "down", "--budget", 1.3),
        *("--write", "--json", "--plot", tmp_path / "sweep.png"),
    )
    result = json.loads(completed.stdout)
    chosen, points = result["chosen"], result["points"]
    assert 1 <= len(points) <= 5 and points[0]["strength"] == -40
    inside = [p for p in points if p["perplexity"] <= 1.3 * result["unsteered"]["perplexity"]]
    assert chosen["effect"] == min(p["effect"] for p in inside)
    assert chosen["effect"] < 0.2 < 0.4 < result["unsteered"]["effect"]
    steer = load_steer(path)
    assert steer.default_strength == chosen["strength"] < 0
    assert steer.recipe["method"] == "fitted"
    assert steer.recipe["sweep"]["chosen"] == chosen
    assert (steer.projector1 == before.projector1).all()
    assert (tmp_path / "sweep.png").exists() and result["written"] == str(path)


@pytest.mark.matrix
def test_a_grid_over_layers_keeps_the_best_ones(tmp_path: Path, prompts: Path) -> None:
    path = tmp_path / "formality.safetensors"
    save_steer(load_steer(STEERS / "formality-vector.safetensors"), path)
    judge = "lexicon:embedded:formality"
    completed = sweep(
        *(path, "--prompts", prompts, "--judge", judge, "--samples", 16, "--json", "--write"),
        *("--strengths", "2,4", "--layers", "all;2-3;1", "--budget", 1.5),
    )
    result = json.loads(completed.stdout)
    assert [(p["candidate"], p["strength"]) for p in result["points"]] == [
        (name, v) for name in ("all", "2-3", "1") for v in (2, 4)
    ]
    # Other layers are other texts: the request's layers reach the model.
    assert len({(p["effect"], p["perplexity"]) for p in result["points"]}) == 6
    assert load_steer(path).layers == tuple(result["chosen"]["layers"])


@pytest.mark.matrix
def test_a_random_steer_has_no_strength_to_write(tmp_path: Path, prompts: Path) -> None:
    path = tmp_path / "random.safetensors"
    save_steer(random_steer(load_steer(STEERS / "sentiment.safetensors")), path)
    before = path.read_bytes()
    completed = sweep(
        *(path, "--prompts", prompts, "--judge", "lexicon:embedded:sentiment", "--samples", 16),
        *("--strengths", "1,2,4", "--write", "--json"),
        code=1,
    )
    assert "no strength within the budget changes the effect" in completed.stderr
    assert json.loads(completed.stdout)["chosen"] is None
    assert path.read_bytes() == before
