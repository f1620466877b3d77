"""Fit, eval and sweep in sequence on a real model: stories that end happily or sadly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outside import STORIES, needs
from stories import write

from vllm_steer import load_steer


def command(*arguments: Any) -> Any:
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()"]
    completed = subprocess.run(
        [*line, *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout)


@pytest.mark.matrix
@needs(STORIES)
def test_a_fit_of_happy_stories_gives_a_strength_that_works(tmp_path: Path) -> None:
    write(tmp_path)
    steer, judge = tmp_path / "happy.safetensors", f"lexicon:{tmp_path / 'lexicon.yaml'}"
    command(
        *("fit", "lm-steer", STORIES, steer),
        *("--positive", tmp_path / "happy.txt", "--negative", tmp_path / "sad.txt"),
        *("--rank", 32, "--steps", 300, "--epsilon", 0.001),
    )
    options = ("--prompts", tmp_path / "prompts.txt", "--enforce-eager", "--samples", 25)
    report = command(
        *("eval", STORIES, steer, "--strengths=-2,-1,1,2", *options, "--max-tokens", 40),
        *("--judge", judge, "--judge", f"perplexity:{STORIES}", "--out", tmp_path / "run"),
    )
    figures = {(s["steer"], s["strength"]): s["figures"] for s in report["settings"]}
    share = {setting: result[judge]["share"] for setting, result in figures.items()}
    assert share["steer", -2] < share["steer", -1] < share["none", 0] < share["steer", 2]
    assert share["steer", 2] - share["steer", -2] > 0.5
    assert abs(share["random", 2] - share["random", -2]) < 0.25
    assert all(f[f"perplexity:{STORIES}"]["total_perplexity"] > 1 for f in figures.values())
    assert report["normalised_effect"][judge]["steer"]["pnes"] > 0.2
    result = command(
        *("sweep", STORIES, steer, *options, "--max-tokens", 40, "--judge", judge),
        *("--range", "0:-4", "--direction", "down", "--rounds", 4, "--budget", 2, "--write"),
    )
    assert result["chosen"]["effect"] < result["unsteered"]["effect"]
    assert result["chosen"]["perplexity_ratio"] <= 2
    assert load_steer(steer).default_strength == result["chosen"]["strength"] < 0
