"""``vllm-steer eval`` on the embedded model, in a separate process with a real engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_steer import SteerError, hf, load_steer
from vllm_steer.cli import app
from vllm_steer.embedded import MODEL, STEERS, corpus
from vllm_steer.evaluation import missing_texts

SENTIMENT = STEERS / "sentiment.safetensors"
LEXICON = "lexicon:embedded:sentiment"
PROMPTS = corpus.NEUTRAL_PROMPTS[:6]
SAMPLES = 16
STRENGTHS = (-5, -2.5, 0, 2.5, 5)


def command(*arguments: Any) -> list[str]:
    run = "from vllm_steer.cli import main; main()"
    return [sys.executable, "-c", run, "eval", *map(str, arguments), "--enforce-eager"]


def run(*arguments: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    completed = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180)
    assert completed.returncode == code, completed.stderr[-3000:]
    return completed


def texts_of(path: Path) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {r["prompt"]["text"]: [g["text"] for g in r["generations"]] for r in rows}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": {"text": p}}) + "\n" for p in PROMPTS))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval") / "run"


@pytest.fixture(scope="module")
def line(folder: Path, prompts: Path) -> tuple[Any, ...]:
    return (
        *("embedded", SENTIMENT, "--strengths=-5:5:2.5", "--prompts", prompts, "--out", folder),
        *("--preset", "lm-steer", "--samples", SAMPLES, "--dtype", "float32", "--json"),
        *("--judge", LEXICON, "--judge", "perplexity:embedded", "--judge", "perspective"),
        *("--judge", "diversity", "--judge", "repetition"),
    )


@pytest.fixture(scope="module")
def killed(folder: Path, line: Any) -> dict[str, Any]:
    """The run folder of a run that was killed after its first condition."""
    first = folder / "generations" / "none.jsonl"
    process = subprocess.Popen(command(*line), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 120
    while not first.exists() and time.monotonic() < give_up:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "report.json").exists()
    return contents(first.parent)


@pytest.fixture(scope="module")
def evaluated(killed: Any, line: Any) -> subprocess.CompletedProcess[str]:
    """The report of the same command after it resumed: all tests below use that run."""
    return run(*line)


def contents(folder: Path) -> dict[str, Any]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.jsonl")}


def shares(report: Any, steer: str) -> list[float]:
    result = {
        s["strength"]: s["figures"][LEXICON]["share"]
        for s in report["settings"]
        if s["steer"] in (steer, "none")
    }
    return [result[strength] for strength in STRENGTHS]


@pytest.mark.matrix
def test_the_effect_rises_with_strength_and_the_control_stays(evaluated: Any) -> None:
    report = json.loads(evaluated.stdout)
    steer, random = shares(report, "steer"), shares(report, "random")
    assert steer == sorted(steer) and steer[0] < 0.1 and steer[-1] > 0.9
    # A random direction blurs: it may pull the share towards one half, whatever its sign. It has
    # no side: 0.15 are three standard errors of a share over 96 texts, 3 sqrt(0.25 / 96).
    assert all(abs(share - steer[2]) < 0.25 for share in random)
    assert all(abs(random[-1 - i] - random[i]) < 0.15 for i in (0, 1))
    pnes = report["normalised_effect"][LEXICON]
    assert pnes["steer"]["pnes"] > 5 * pnes["random"]["pnes"]


@pytest.mark.matrix
def test_the_report_names_model_steers_and_settings(evaluated: Any, folder: Path) -> None:
    report = json.loads(evaluated.stdout)
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["sampling"]["samples"] == SAMPLES and report["sampling"]["exact_length"]
    assert report["prompts"]["count"] == len(PROMPTS)
    assert set(report["settings"][0]["figures"]["perplexity:embedded"]) >= {
        "perplexity",
        "total_perplexity",
        "dropped",
    }
    assert set(report["settings"][0]["figures"]["diversity"]) == {"dist-1", "dist-2", "dist-3"}
    assert (folder / "report.md").read_text().startswith("# sentiment.safetensors on embedded")
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.matrix
def test_an_unavailable_judge_is_named(evaluated: Any) -> None:
    assert list(json.loads(evaluated.stdout)["not_at_hand"]) == ["perspective"]
    assert "not available: perspective: " in evaluated.stderr


@pytest.mark.matrix
def test_every_text_exists_and_differs_by_its_seed(evaluated: Any, folder: Path) -> None:
    names = sorted(path.stem for path in (folder / "generations").iterdir())
    steered = [f"{steer}{v:+g}" for steer in ("random", "steer") for v in (2.5, 5, -2.5, -5)]
    assert names == sorted(["none", *steered])
    for name in names:
        result = texts_of(folder / "generations" / f"{name}.jsonl")
        assert tuple(result) == PROMPTS
        assert all(len(texts) == SAMPLES and len(set(texts)) > 4 for texts in result.values())


@pytest.mark.matrix
def test_a_killed_run_continues_after_its_last_setting(
    killed: dict[str, Any], evaluated: Any, folder: Path
) -> None:
    now = contents(folder / "generations")
    assert "none.jsonl" in killed and len(killed) < len(now) == 9
    assert killed.items() <= now.items()


@pytest.mark.matrix
def test_finished_settings_are_not_generated_again(
    evaluated: Any, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_texts, "engine", None)  # none is started
    before = contents(folder / "generations")
    line = ["embedded", SENTIMENT, "--strengths=-5,5", "--prompts", prompts, "--out", folder]
    line += ["--preset", "lm-steer", "--dtype", "float32", "--judge", LEXICON, "--no-plot"]

    def again(samples: int) -> Any:
        arguments = ["eval", *map(str, line), "--samples", str(samples)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    assert again(SAMPLES).exit_code == 0
    assert contents(folder / "generations") == before
    expected = r"sampling\.samples was 16 and is now 3; give the same settings to resume it"
    with pytest.raises(SteerError, match=expected):
        again(3)


def test_greedy_texts_are_those_of_hugging_face(tmp_path: Path, prompts: Path) -> None:
    run(
        *("embedded", SENTIMENT, "--strengths", "4", "--prompts", prompts, "--out", tmp_path),
        *("--temperature", 0, "--samples", 1, "--exact-length", "--dtype", "float32"),
        *("--judge", "diversity", "--no-plot"),
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    settings: dict[str, dict[str, float]] = {"none": {}, "steer+4": {"own": 4.0}}
    for name, strengths in settings.items():
        result = texts_of(tmp_path / "generations" / f"{name}.jsonl")
        for prompt, (text,) in result.items():
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with hf.steered(model, strengths, {"own": load_steer(SENTIMENT)}):
                row = model.generate(tokens, do_sample=False, max_new_tokens=20, min_new_tokens=20)[
                    0
                ]
            whole = tokenizer.decode(row, skip_special_tokens=True)
            assert text == whole[len(prompt) :]


@pytest.mark.matrix
def test_seeded_texts_after_more_prompt_tokens_than_one_step_takes(tmp_path: Path) -> None:
    """vLLM's V1 runner cannot take a part of a prompt with a seed on a CPU."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [" ".join([str(k), *corpus.NEUTRAL_PROMPTS * 8]) for k in range(24)]
    assert sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) > 8192
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts))
    run(
        *("embedded", SENTIMENT, "--strengths", "4", "--prompts", path, "--out", tmp_path / "run"),
        *("--samples", 2, "--max-tokens", 3, "--judge", "diversity", "--no-plot"),
    )
    assert len(texts_of(tmp_path / "run" / "generations" / "none.jsonl")) == len(prompts)
