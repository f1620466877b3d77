"""The comparison with other tools: each baseline is correct, and the command runs from start to
end.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decode import DecodeLeg
from benchmarks.dummy_model import SHAPES, write_model
from benchmarks.peers.hf_engine import HuggingFaceEngine
from benchmarks.peers.hf_lm_steer import WAYS, HuggingFaceSteeredHead
from benchmarks.peers.hooks_eager import hook_layers
from benchmarks.peers.job import PeerJob
from benchmarks.rounds import Round
from benchmarks.table import COLUMNS
from vllm_steer import LMSteer, hf

ROOT = Path(__file__).parents[1]
VOCAB = SHAPES["tiny"].vocab_size
PROMPTS = [[1 + (97 * row + i) % (VOCAB - 2) for i in range(8)] for row in range(3)]
STEPS = 4
TOKENS = 10  # 4 lead steps, 4 timed ones, 2 at the end


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A GPT-2 with random weights, in float64, not wrapped yet."""
    torch.manual_seed(0)
    folder = write_model(SHAPES["tiny"], tmp_path / "tiny")
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.fixture
def steer() -> LMSteer:
    """Two columns of rank 3."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 2, 64, 3, generator=generator)
    return LMSteer(
        variant="multiply", epsilon=0.25, hidden_size=64, projector1=first, projector2=second
    )


@pytest.fixture
def job() -> PeerJob:
    return PeerJob(
        "hooks-eager", "tiny", Path("model"), Path("steers"), "float32", 16, [1, 4], 2, 4
    )


def rounds_of(*ratios: float) -> list[Round[DecodeLeg]]:
    """Two rows, whose plain steps take 2 ms."""
    plain = [DecodeLeg(2.0, ((1,), (2,))) for _ in range(len(ratios) + 1)]
    other_legs = [DecodeLeg(2 * ratio, ((1,), (2,))) for ratio in ratios]
    return [Round(*legs) for legs in zip(plain, other_legs, plain[1:], strict=False)]


def test_the_hugging_face_engine_decodes_as_generate_does(model: Any) -> None:
    engine = HuggingFaceEngine(model, lambda _: None)
    leg = engine.leg([None] * 3, STEPS, VOCAB)
    prompts = torch.tensor(PROMPTS)
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    assert [list(tokens) for tokens in leg.tokens] == expected[:, 8:].tolist()


def test_the_hugging_face_engine_scores_forced_tokens(model: Any) -> None:
    engine = HuggingFaceEngine(model, lambda _: None)
    forced = [[(31 * row + 7 * i) % VOCAB for i in range(TOKENS)] for row in range(3)]
    leg = engine.leg([None] * 3, STEPS, VOCAB, logprobs=True, forced=forced)
    assert [list(tokens) for tokens in leg.tokens] == forced
    texts = torch.tensor([a + b for a, b in zip(PROMPTS, forced, strict=True)])
    logprobs = model(texts).logits.log_softmax(-1)[:, 7:-1]
    expected = logprobs.gather(2, torch.tensor(forced)[:, :, None]).sum((1, 2))
    torch.testing.assert_close(torch.tensor(leg.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_the_hugging_face_engine_sets_the_steer_of_the_batch_once_per_leg(model: Any) -> None:
    steers_set: list[str | None] = []
    engine = HuggingFaceEngine(model, steers_set.append)
    engine.leg(["s0:5"] * 2, STEPS, VOCAB)
    engine.leg([None] * 2, STEPS, VOCAB)
    assert steers_set == ["s0:5", None]


@pytest.mark.parametrize("method", WAYS)
def test_both_ways_to_steer_a_head_give_the_logits_of_the_equation(
    model: Any, steer: LMSteer, method: str
) -> None:
    texts = torch.tensor(PROMPTS)
    with hf.steered(model, {"s": 2.5}, {"s": steer}):
        expected = model(texts).logits
    head = HuggingFaceSteeredHead(model.get_output_embeddings(), steer)
    head.change = WAYS[method]
    head.set_values(2.5, 2.5)
    model.set_output_embeddings(head)
    torch.testing.assert_close(model(texts).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", WAYS)
def test_steer_values_of_a_head_scale_its_columns(model: Any, steer: LMSteer, method: str) -> None:
    head = HuggingFaceSteeredHead(model.get_output_embeddings(), steer)
    head.change = WAYS[method]
    head.set_values(2.0, -1.0)
    x = torch.randn(3, 2, 64, dtype=torch.float64)
    parts = [
        v * (x @ p1.double()) @ p2.double().mT
        for v, p1, p2 in zip((2.0, -1.0), steer.projector1, steer.projector2, strict=True)
    ]
    torch.testing.assert_close(head(x), head.head(x + 0.25 * (parts[0] + parts[1])))


def test_a_head_whose_steer_values_are_zero_is_the_plain_head(model: Any, steer: LMSteer) -> None:
    texts = torch.tensor(PROMPTS)
    expected = model(texts).logits
    model.set_output_embeddings(HuggingFaceSteeredHead(model.get_output_embeddings(), steer))
    assert torch.equal(model(texts).logits, expected)


def test_hooks_add_each_layer_its_vector_once_per_pass() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    vectors, x = torch.randn(2, 3), torch.randn(5, 3)
    plain = [layer(x) for layer in model.layers]
    handles = hook_layers(model, vectors)
    for layer, before, vector in zip(model.layers, plain, vectors, strict=True):
        assert torch.equal(layer(x), before + vector)
    for handle in handles:
        handle.remove()
    assert torch.equal(model.layers[0](x), plain[0])


def test_the_llama_of_a_shape_has_its_size() -> None:
    gpt2, llama = SHAPES["gpt2-medium"], SHAPES["gpt2-medium-as-llama"]
    assert (llama.hidden_size, llama.layers) == (gpt2.hidden_size, gpt2.layers)
    assert llama.vocab_size == gpt2.vocab_size
    assert math.isclose(llama.read_params, gpt2.read_params, rel_tol=0.02)


def test_a_line_names_its_comparison_or_that_it_was_skipped(job: PeerJob) -> None:
    alone = job.line("ours guided", rounds_of(1.0, 1.5, 2.0), rank=16)
    fields = {"rows": 2, "unsteered_ms": 2.0, "steered_ms": 3.0, "ratio_median": 1.5}
    assert alone | fields | {"tokens_per_s": 666.7} == alone
    compared = alone | dict.fromkeys(("over_ours_p20", "over_ours_median", "over_ours_p80"), 2.0)
    skipped = {"name": "lora-r64", "shape": "tiny", "skipped": "it is not here"}
    _, cell = COLUMNS["peers"][-1]
    texts = [cell(line) for line in (alone, compared, skipped)]
    assert texts == ["-", "2.00 (2.00 to 2.00)", "not run"]


def test_an_unknown_peer_is_refused_by_the_command(tmp_path: Path) -> None:
    process = _command(tmp_path / "out.json", "--only", "hooks-eager,magic")
    assert process.returncode == 2
    assert "unknown: magic; known: ['hf-lm-steer', 'hooks-eager'" in process.stderr


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("peers") / "result.json"
    options = ["--shape", "tiny", "--rank", "16", "--dtype", "float32", "--quick"]
    process = _command(path, *options)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(path.read_text())


def _command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("VLLM_STEER_DISABLE", None)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_peers", "--json", str(out), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.matrix
def test_every_peer_is_compared_with_vllm_steer(result: dict[str, Any]) -> None:
    cases = [(line["name"], line["shape"], line["rows"]) for line in result["rows"]]
    llama = "tiny-as-llama"
    expected = [
        *((name, "tiny", n) for n in (1, 4) for name in ("ours lm-steer", *WAYS)),
        *((name, "tiny", n) for n in (1, 4) for name in ("ours guided", "hooks-eager")),
        *((name, llama, n) for n in (1, 4) for name in ("ours lm-steer", "lora-r64")),
    ]
    assert cases == expected


@pytest.mark.matrix
def test_figures_are_finite_and_ordered(result: dict[str, Any]) -> None:
    for line in result["rows"]:
        assert "skipped" not in line
        assert line["tokens_per_s"] > 0
        for ratio in ("ratio", "over_ours"):
            if ratio == "over_ours" and line["name"].startswith("ours"):
                assert "over_ours_median" not in line
                continue
            ratios = [line[f"{ratio}_{share}"] for share in ("p20", "median", "p80")]
            assert all(math.isfinite(number) and number > 0 for number in ratios)
            assert ratios == sorted(ratios)


@pytest.mark.matrix
def test_the_result_names_the_machine_and_the_versions(result: dict[str, Any]) -> None:
    assert result["benchmark"] == "peers"
    assert (result["shape"], result["dtype"]) == ("tiny", "float32")
    assert {"python", "torch", "vllm", "vllm_steer", "transformers"} <= set(result["versions"])
    assert result["threads"] >= 1
    assert str(ROOT) not in json.dumps(result["rows"])
