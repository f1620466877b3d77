"""The comparison with other tools: each baseline computes what it is said to, and the command runs
from start to end.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_steer import LMSteer, hf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from decode import Comparison, Leg, run_leg  # noqa: E402
from dummy_model import SHAPES  # noqa: E402
from peers import alone, checkpoint, columns, interpreters, lines  # noqa: E402
from peers.hf_engine import HuggingFaceEngine  # noqa: E402
from peers.hf_lm_steer import WAYS, SteeredHead  # noqa: E402
from peers.hooks_eager import hook_layers  # noqa: E402
from peers.hotwire_vllm import HotwireEngine  # noqa: E402
from peers.job import Job  # noqa: E402
from peers.vllm_lens import GenerateLeg  # noqa: E402

VOCAB = SHAPES["tiny"].vocab_size
PROMPTS = [[1 + (97 * row + i) % (VOCAB - 2) for i in range(8)] for row in range(3)]
STEPS = 4
TOKENS = 10  # 4 lead steps, 4 timed ones, 2 at the end


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A GPT-2 with random weights, in float64, not wrapped yet."""
    torch.manual_seed(0)
    folder = checkpoint.write_model(SHAPES["tiny"], tmp_path / "tiny")
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
def job() -> Job:
    return Job("hooks-eager", "tiny", "model", "steers", "float32", 16, (1, 4), 2, 4)


def comparison(*ratios: float) -> Comparison:
    legs = tuple(Leg(step_ms=2 * ratio, tokens=((1,), (2,))) for ratio in ratios)
    plain = tuple(Leg(step_ms=2.0, tokens=((1,), (2,))) for _ in range(len(ratios) + 1))
    return Comparison(plain, legs)


def test_the_hugging_face_engine_decodes_as_generate_does(model: Any) -> None:
    engine = HuggingFaceEngine(model, lambda _: None)
    leg = run_leg(engine, [None] * 3, STEPS, VOCAB)
    prompts = torch.tensor(PROMPTS)
    wanted = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    assert [list(tokens) for tokens in leg.tokens] == wanted[:, 8:].tolist()


def test_the_hugging_face_engine_scores_the_tokens_that_it_is_made_to_follow(model: Any) -> None:
    engine = HuggingFaceEngine(model, lambda _: None)
    forced = [[(31 * row + 7 * i) % VOCAB for i in range(TOKENS)] for row in range(3)]
    with engine.following(forced):
        leg = run_leg(engine, [None] * 3, STEPS, VOCAB, logprobs=True)
    assert [list(tokens) for tokens in leg.tokens] == forced
    texts = torch.tensor([a + b for a, b in zip(PROMPTS, forced, strict=True)])
    read = model(texts).logits.log_softmax(-1)[:, 7:-1]
    wanted = read.gather(2, torch.tensor(forced)[:, :, None]).sum((1, 2))
    torch.testing.assert_close(torch.tensor(leg.logprobs).double(), wanted, rtol=0, atol=1e-4)


def test_the_hugging_face_engine_sets_the_steer_of_the_batch_once_per_leg(model: Any) -> None:
    asked: list[str | None] = []
    engine = HuggingFaceEngine(model, asked.append)
    run_leg(engine, ["s0:5"] * 2, STEPS, VOCAB)
    run_leg(engine, [None] * 2, STEPS, VOCAB)
    assert asked == ["s0:5", None]


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_to_steer_a_head_give_the_logits_of_the_equation(
    model: Any, steer: LMSteer, way: str
) -> None:
    texts = torch.tensor(PROMPTS)
    with hf.steered(model, {"s": 2.5}, {"s": steer}):
        wanted = model(texts).logits
    head = SteeredHead(model.get_output_embeddings(), steer)
    head.change = WAYS[way]
    head.set_values(2.5, 2.5)
    model.set_output_embeddings(head)
    torch.testing.assert_close(model(texts).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_steer_values_of_a_head_weigh_its_columns(model: Any, steer: LMSteer, way: str) -> None:
    head = SteeredHead(model.get_output_embeddings(), steer)
    head.change = WAYS[way]
    head.set_values(2.0, -1.0)
    x = torch.randn(3, 2, 64, dtype=torch.float64)
    parts = [
        v * (x @ p1.double()) @ p2.double().mT
        for v, p1, p2 in zip((2.0, -1.0), steer.projector1, steer.projector2, strict=True)
    ]
    torch.testing.assert_close(head.steered(x), x + 0.25 * (parts[0] + parts[1]))


def test_a_head_whose_steer_values_are_zero_is_the_plain_head(model: Any, steer: LMSteer) -> None:
    texts = torch.tensor(PROMPTS)
    wanted = model(texts).logits
    model.set_output_embeddings(SteeredHead(model.get_output_embeddings(), steer))
    assert torch.equal(model(texts).logits, wanted)


def test_hooks_add_each_layer_its_vector_once_per_pass() -> None:
    class Pair(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(3, 3), Pair(3, 3)])
    vectors, x = torch.randn(2, 3), torch.randn(5, 3)
    plain, (first, residual) = model.layers[0](x), model.layers[1](x)
    handles = hook_layers(model, vectors)
    assert torch.equal(model.layers[0](x), plain + vectors[0])
    found = model.layers[1](x)
    assert torch.equal(found[0], first + vectors[1])
    assert torch.equal(found[1], residual)
    for handle in handles:
        handle.remove()
    assert torch.equal(model.layers[0](x), plain)


def test_hotwire_is_asked_for_one_vector_in_every_layer() -> None:
    idle = SimpleNamespace(llm_engine=SimpleNamespace(step=None, has_unfinished_requests=None))
    extra_args, keywords = HotwireEngine(idle, layers=2).request("guided:5.0")
    assert json.loads(extra_args["hotwire"]) == [
        {"id": "guided", "layer": 0, "scale": 5.0},
        {"id": "guided", "layer": 1, "scale": 5.0},
    ]
    assert keywords == {}
    assert HotwireEngine(idle, layers=2).request(None) == (None, {})


class IdleEngine:
    """An engine whose steps do nothing."""

    def step(self) -> list[Any]:
        return []


class CountingLLM:
    """An ``LLM`` that takes one step per token and gives every row its own token."""

    def __init__(self) -> None:
        self.llm_engine = IdleEngine()
        self.asked: list[Any] = []

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        self.asked = [given.extra_args for given in params]
        for _ in range(params[0].max_tokens):
            self.llm_engine.step()
        rows = range(len(prompts))
        tokens = [[row] * params[0].max_tokens for row in rows]
        outputs = [SimpleNamespace(token_ids=found, cumulative_logprob=-1.0) for found in tokens]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


def test_a_leg_through_generate_times_the_steps_of_the_engine() -> None:
    llm = CountingLLM()
    given: list[str] = []

    def extra_args(steer: str) -> dict[str, Any]:
        given.append(steer)
        return {"vectors": len(given)}

    leg = GenerateLeg(extra_args)(llm, ["v:2", None, "v:2"], STEPS, VOCAB, logprobs=True)
    assert leg.tokens == ((0,) * TOKENS, (1,) * TOKENS, (2,) * TOKENS)
    assert leg.logprobs == (-1.0, -1.0, -1.0)
    assert leg.step_ms > 0
    assert llm.asked == [{"vectors": 1}, None, {"vectors": 2}]
    assert "step" not in vars(llm.llm_engine), "the engine is still being timed"


def test_a_steer_without_effect_on_a_row_is_noticed() -> None:
    plain = Leg(1.0, ((1, 2), (3, 4)), (-1.0, -2.0))
    steered = Leg(1.0, ((1, 2), (3, 4)), (-1.5, -2.0))
    with pytest.raises(AssertionError, match="row 1 of 2 was not changed by its steer"):
        alone.check_changed(plain, steered)
    alone.check_changed(plain, Leg(1.0, ((1, 2), (3, 5)), (-1.5, -2.0)))


def test_the_llama_of_a_shape_has_its_size() -> None:
    gpt2, llama = SHAPES["gpt2-medium"], checkpoint.shape_named("gpt2-medium-as-llama")
    assert (llama.hidden_size, llama.layers, llama.vocab_size) == (1024, 24, 50257)
    assert math.isclose(llama.read_params, gpt2.read_params, rel_tol=0.02)
    assert checkpoint.llama_name("gpt2-medium") == "gpt2-medium-as-llama"
    assert checkpoint.llama_name("llama-8b") == "llama-8b"


def test_a_job_comes_back_from_its_file(job: Job, tmp_path: Path) -> None:
    assert Job.read(job.write(tmp_path / "job.json")) == job


def test_a_figure_line_holds_both_comparisons(job: Job) -> None:
    line = lines.figure_line(
        job, "hooks-eager", "vllm 1", comparison(1.0, 1.5, 2.0), comparison(3.0), rank=16
    )
    assert tuple(line) == lines.KEYS
    assert (
        line
        | {
            "rows": 2,
            "unsteered_ms": 2.0,
            "steered_ms": 3.0,
            "ratio_median": 1.5,
            "tokens_per_s": 666.7,
            "over_ours_median": 3.0,
            "skipped": None,
        }
        == line
    )


def test_a_peer_left_out_has_a_reason_and_no_figure() -> None:
    line = lines.skipped_line("vllm-lens", "tiny", "it is not here")
    assert tuple(line) == lines.KEYS
    figures = {key: line[key] for key in lines.KEYS if key not in ("name", "shape", "skipped")}
    assert set(figures.values()) == {None}
    assert columns.reasons({"rows": [line]}) == ["vllm-lens: it is not here."]


def test_every_line_has_a_cell_under_each_heading(job: Job) -> None:
    found = [
        lines.figure_line(job, "ours guided", "vllm 1", comparison(1.0)),
        lines.figure_line(job, "hooks-eager", "vllm 1", comparison(1.0), comparison(2.0)),
        lines.skipped_line("vllm-lens", "tiny", "it is not here"),
    ]
    rows = [columns.cells(line) for line in found]
    assert {len(row) for row in rows} == {len(columns.HEADINGS)}
    assert [row[-1] for row in rows] == ["-", "2.00 (2.00 to 2.00)", "not run"]


def test_everything_that_an_interpreter_lacks_is_named() -> None:
    probed = {"python": [3, 11], "found": {"vllm_lens": False, "vllm": False}, "cuda": False}
    assert interpreters.describe_lack(interpreters.PACKAGES["vllm-lens"], probed) == (
        "vllm-lens is not installed in this Python; vllm is not installed in this Python; "
        "it needs Python 3.12, this is 3.11; no CUDA device is there"
    )


def test_an_interpreter_that_lacks_nothing_can_try() -> None:
    probed = {"python": [3, 12], "found": {"hotwire": True, "vllm": True}, "cuda": True}
    assert interpreters.describe_lack(interpreters.PACKAGES["hotwire-vllm"], probed) is None


def test_an_interpreter_that_does_not_exist_is_a_reason(tmp_path: Path) -> None:
    reason = interpreters.reason_against("hotwire-vllm", str(tmp_path / "python"))
    assert reason == "the interpreter python does not run: FileNotFoundError"


def test_an_unknown_peer_is_refused_by_the_command(tmp_path: Path) -> None:
    done = _command(tmp_path / "out.json", "--only", "hooks-eager,magic")
    assert done.returncode == 2
    assert "unknown: magic; peers: ['hf-lm-steer', 'hooks-eager'" in done.stderr


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("peers") / "result.json"
    options = ["--shape", "tiny", "--rank", "16", "--dtype", "float32", "--quick"]
    done = _command(path, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def _command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("VLLM_STEER_DISABLE", None)
    return subprocess.run(
        [sys.executable, "benchmarks/bench_peers.py", "--json", str(out), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.matrix
def test_every_peer_is_measured_beside_ours_or_left_out(result: dict[str, Any]) -> None:
    cases = [(line["name"], line["shape"], line["rows"]) for line in result["rows"]]
    llama = "tiny-as-llama"
    wanted = [
        *((name, "tiny", n) for n in (1, 4) for name in ("ours lm-steer", *WAYS)),
        *((name, "tiny", n) for n in (1, 4) for name in ("ours guided", "hooks-eager")),
        *((name, llama, n) for n in (1, 4) for name in ("ours lm-steer", "lora-r64")),
    ]
    assert cases[: len(wanted)] == wanted
    assert [name for name, *_ in cases[len(wanted) :]] == ["hotwire-vllm", "vllm-lens"]


@pytest.mark.matrix
def test_figures_are_finite_and_ordered(result: dict[str, Any]) -> None:
    for line in result["rows"]:
        assert tuple(line) == lines.KEYS
        if line["skipped"]:
            continue
        assert line["tokens_per_s"] > 0
        for ratio in ("ratio", "over_ours"):
            found = [line[f"{ratio}_{share}"] for share in ("p20", "median", "p80")]
            if ratio == "over_ours" and line["name"].startswith("ours"):
                assert found == [None, None, None]
                continue
            assert all(math.isfinite(number) and number > 0 for number in found)
            assert found == sorted(found)


@pytest.mark.matrix
def test_the_result_says_where_and_with_what_it_was_measured(result: dict[str, Any]) -> None:
    assert result["benchmark"] == "peers"
    assert (result["shape"], result["dtype"]) == ("tiny", "float32")
    assert {"python", "torch", "vllm", "vllm_steer", "transformers"} <= set(result["versions"])
    assert result["threads"] >= 1
    assert str(ROOT) not in json.dumps(result["rows"])
