"""``vllm-steer compare`` on the embedded model: a real engine and dynamic steers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer import hf, load_steer
from vllm_steer.embedded import MODEL, STEERS

pytestmark = pytest.mark.matrix

PROMPTS = ("Hotel Astoria:", "Film Nova:", "Yoga Flora:", "Boutique Vega:")
OTHERS = ("Hotel Regina:", "Film Orion:")
# A text continues in the language of its beginning: a French sentence replaces an English one.
EXAMPLES = (
    {"icl": "Le personnel était charmant.", "prompt": "The staff was charming."},
    {"icl": "La musique était magnifique.", "prompt": "The music was wonderful."},
    {"icl": "Le film était une merveille.", "prompt": "The film was a marvel."},
)
SAMPLES, TOKENS, MAXIMUM = 6, 12, 1.5
SPEC = {
    "properties": {
        "fr": {
            "steer": str(STEERS / "french-delta.safetensors"),
            "judge": "lexicon:embedded:language=fr",
            "strengths": [0.1, 1.5],
            "max": MAXIMUM,
        },
        "cheer": {
            "steer": str(STEERS / "sentiment.safetensors"),
            "judge": "lexicon:embedded:sentiment",
            "strengths": 5,
            "max": 10,
        },
    },
    "seen": ["fr", "cheer"],
    "unseen": ["fr+cheer"],
    "examples": {"fr": "examples.jsonl"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def report(folder: Path) -> Any:
    rows = "".join(json.dumps(row) + "\n" for row in EXAMPLES)
    (folder / "examples.jsonl").write_text(rows)
    (folder / "asked.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    for name, prompts in (("prompts", PROMPTS), ("others", OTHERS)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    run = "from vllm_steer.cli import main; main()"
    line = [sys.executable, "-c", run, "compare", "embedded", "asked.yaml"]
    line += ["--out", "run", "--json"]
    line += ["--prompts", "prompts.txt", "--choose-prompts", "others.txt", "--enforce-eager"]
    line += ["--samples", str(SAMPLES), "--max-tokens", str(TOKENS), "--dtype", "float32"]
    completed = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout)


def row(report: Any, combination: str, method: str) -> Any:
    (result,) = (
        r for r in report["rows"] if (r["combination"], r["method"]) == (combination, method)
    )
    return result


def test_the_stronger_of_two_fixed_strengths_is_chosen_and_reused(report: Any) -> None:
    assert report["chosen"]["fixed"]["fr"] == {"strength": 1.5, "schedule": "fixed"}
    assert row(report, "fr+cheer", "fixed")["steer"] == report["chosen"]["fixed"]
    assert not row(report, "fr+cheer", "fixed")["seen"]


@pytest.mark.parametrize("method", ["fixed", "dim", "dynamic"])
def test_steered_texts_are_french_more_often_than_unsteered_ones(report: Any, method: str) -> None:
    share = row(report, "fr", method)["share"]["fr"]
    assert share > 0.6 > row(report, "fr", "none")["share"]["fr"]


def test_every_row_has_all_figures(report: Any) -> None:
    for row in report["rows"]:
        assert row["figures"]["perplexity:embedded"]["total_perplexity"] > 1
        assert 0 < row["figures"]["diversity"]["dist-2"] <= 1
        assert row["all"] <= min(row["share"].values())
    absent = [(row["combination"], row["method"]) for row in report["absent"]]
    assert absent == [("cheer", "start"), ("cheer", "dim")]


def test_each_text_has_a_strength_for_each_of_its_tokens(report: Any, folder: Path) -> None:
    strengths = json.loads((folder / "run" / "strengths.json").read_text())["fr+cheer"]
    for name, maximum in (("fr", MAXIMUM), ("cheer", 10)):
        texts = [text for prompt in strengths[name] for text in prompt]
        assert len(texts) == len(PROMPTS) * SAMPLES
        assert all(0 <= value <= maximum for text in texts for value in text)
        assert all(0 < len(text) <= TOKENS for text in texts)
    first = {text[0] for prompt in strengths["fr"] for text in prompt}
    assert len(first) <= len(PROMPTS)  # nothing is sampled before the first strength
    assert (folder / "run" / "strengths.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_the_first_strength_is_the_divergence_of_the_first_token(report: Any, folder: Path) -> None:
    result = json.loads((folder / "run" / "strengths.json").read_text())["fr"]["fr"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    steers = {"fr": load_steer(STEERS / "french-delta.safetensors")}
    for prompt, texts in zip(PROMPTS, result, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        base = model(input_ids=tokens).logits[0, -1].double()
        with hf.steered(model, {"fr": MAXIMUM}, steers):
            probe = model(input_ids=tokens).logits[0, -1].double()
        top_tokens = sorted({*_top(base), *_top(probe)})
        p, q = (logits.softmax(-1)[top_tokens] for logits in (base, probe))
        p, q = p / p.sum(), q / q.sum()
        expected = min(max(float((p * (p / q).log()).sum()), 0.0), MAXIMUM)
        assert texts[0][0] == pytest.approx(expected, abs=1e-3)


def _top(logits: torch.Tensor) -> list[int]:
    """The most probable tokens up to the one at which their sum exceeds one half."""
    top_tokens: list[int] = []
    total = 0.0
    for token in logits.argsort(descending=True).tolist():
        top_tokens.append(token)
        total += float(logits.softmax(-1)[token])
        if total > 0.5:
            break
    return top_tokens


def test_dppl_needs_examples_and_is_least_where_the_text_follows_them(report: Any) -> None:
    result = {m: row(report, "fr", m)["dppl"] for m in ("none", "fixed", "dynamic")}
    assert all(item["of"] == item["examples"] == len(EXAMPLES) for item in result.values())
    # What the French sentence makes the model say is likelier after the English one if steered.
    assert result["none"]["median"] > result["dynamic"]["median"]
    assert "no prompts with demonstrations" in row(report, "cheer", "fixed")["dppl"]["reason"]
