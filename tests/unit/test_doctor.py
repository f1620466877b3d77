"""The parts of the doctor: what is found of environments, configs, answers and memory."""

import io
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, embedded, save_steer
from vllm_steer.bank import fill_head_bank, fill_layer_bank
from vllm_steer.cli.terminal import Console
from vllm_steer.doctor import Finding, environment
from vllm_steer.doctor.architecture import describe, read_architecture
from vllm_steer.doctor.engine import run_engine
from vllm_steer.doctor.environment import environment as look
from vllm_steer.doctor.memory import config_memory, example_memory, takes
from vllm_steer.doctor.parity import compare, zero_steers
from vllm_steer.doctor.report import examine, failed, table
from vllm_steer.doctor.served import Answer, Job, Served
from vllm_steer.doctor.trials import prompts

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def described(config: Any, name: str, folder: Path) -> dict[str, Finding]:
    config.architectures = [name]
    config.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return by_name(describe(read_architecture(str(folder))))


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {name.removeprefix("site "): f.state for name, f in found.items() if "site" in name}


ALL = dict.fromkeys(("head", "resid", "attn_in", "attn_out", "heads"), "ok")


def test_a_model_with_every_site_is_told_by_its_config_alone(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**{**SMALL, "num_attention_heads": 4}, head_dim=32)
    found = described(config, "Qwen3ForCausalLM", tmp_path)
    assert states(found) == ALL
    assert found["sizes"].figures == {"hidden_size": 64, "layers": 3, "vocab_size": 500}
    assert found["site resid"].figures["width"] == 64
    assert found["site heads"].figures["width"] == 4 * 32
    assert not failed(list(found.values()))


def test_a_model_without_an_input_norm_lacks_one_site_and_that_is_no_failure(
    tmp_path: Path,
) -> None:
    found = described(transformers.Olmo2Config(**SMALL), "Olmo2ForCausalLM", tmp_path)
    assert states(found) == {**ALL, "attn_in": "missing"}
    assert "norm before its attention: the site attn_in does not" in found["site attn_in"].said
    assert not failed(list(found.values()))


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (transformers.GraniteConfig(**SMALL), "GraniteForCausalLM", "has not been tested"),
        (transformers.DeepseekV3Config(**SMALL), "DeepseekV3ForCausalLM", "in float16 its stream"),
    ],
)
def test_an_unsupported_model_keeps_the_head_and_says_why_not_the_rest(
    config: Any, name: str, reason: str, tmp_path: Path
) -> None:
    found = described(config, name, tmp_path)
    assert states(found) == {**dict.fromkeys(ALL, "missing"), "head": "ok"}
    assert reason in found["site heads"].said
    assert "LlamaForCausalLM" not in found["site heads"].said


HEADS = {
    "bias": (
        transformers.GPTJConfig(vocab_size=500, n_embd=64, n_layer=2, n_head=2, rotary_dim=16),
        "GPTJForCausalLM",
        {"bias": True, "tied": False, "soft_cap": None, "logit_scale": None},
    ),
    "soft-cap": (
        transformers.Gemma2Config(**SMALL, final_logit_softcapping=7.0),
        "Gemma2ForCausalLM",
        {"bias": False, "tied": True, "soft_cap": 7.0, "logit_scale": None},
    ),
    "scale": (
        transformers.GraniteConfig(**SMALL, logits_scaling=3.0, tie_word_embeddings=False),
        "GraniteForCausalLM",
        {"bias": False, "tied": False, "soft_cap": None, "logit_scale": 3.0},
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_described(kind: str, tmp_path: Path) -> None:
    config, name, figures = HEADS[kind]
    assert described(config, name, tmp_path)["LM head"].figures == figures


@pytest.mark.parametrize("content", ["{", '{"model_type": "no such"}', "{}"])
def test_a_config_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SteerError, match=f"model {tmp_path}: cannot be read"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.25.0", "warning"), ("0.25.1", "ok"), ("0.33.7+cpu", "ok"), ("0.34.0", "warning")],
)
def test_vllm_outside_the_tested_versions_is_a_warning(
    version: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "version", lambda name: version)
    assert by_name(look())["vllm"].state == state


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    found = by_name(look())
    assert (found["vllm"].state, found["triton"].state) == ("FAILED", "missing")


@pytest.mark.parametrize(
    ("variables", "state", "said"),
    [
        ({}, "ok", "installed and active, entry point steer"),
        ({"VLLM_STEER_DISABLE": "0"}, "ok", "installed"),
        ({"VLLM_STEER_DISABLE": "1"}, "FAILED", "switched off by VLLM_STEER_DISABLE=1; unset it"),
        ({"VLLM_PLUGINS": "other"}, "FAILED", "VLLM_PLUGINS=other leaves steer out; add it"),
        ({"VLLM_PLUGINS": "other,steer"}, "ok", "installed"),
    ],
)
def test_whether_vllm_will_load_the_plugin(
    variables: dict[str, str], state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = by_name(look())["plugin"]
    assert found.state == state and said in found.said


def test_a_plugin_that_is_switched_off_fails_and_starts_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STEER_DISABLE", "1")
    found = list(examine(read_architecture("embedded")))
    assert failed(found)
    engine = by_name(found)["engine"]
    assert engine.state == "not tested" and "VLLM_STEER_DISABLE" in engine.said


# Parity: answers written by the formula in this test.


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(embedded.MODEL).eval()


def add_steer(seed: int = 1, size: float = 1.0) -> LMSteer:
    vector = size * torch.randn(1, 128, generator=torch.Generator().manual_seed(seed))
    return LMSteer(variant="add", add=vector, epsilon=0.5, hidden_size=128)


@torch.no_grad()
def greedy(model: Any, steer: LMSteer | None, prompt: list[int], strength: float) -> Answer:
    """Greedy text of softmax(W (c + epsilon v A)), one forward pass a token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(6):
        hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0, -1]
        if steer is not None:
            hidden = hidden + steer.epsilon * strength * steer.add[0]
        choices = (model.lm_head.weight @ hidden).log_softmax(-1)
        tokens.append(int(choices.argmax()))
        logprobs.append(float(choices.max()))
    return Answer({"it": strength} if steer else {}, prompt, tokens, logprobs)


def served(model: Any, steer: LMSteer, strength: float = 1.0) -> Served:
    prompts = [[5, 6, 7], [40, 50, 60, 70]]
    unsteered = [greedy(model, None, prompt, 0) for prompt in prompts]
    large = [greedy(model, steer, prompt, strength) for prompt in prompts]
    batches = {"unsteered": unsteered, "zero": unsteered, "large": large}
    return Served(dtype="float32", runner="V1", device="cpu", batches=batches)


def test_answers_by_the_formula_are_found_equal(model: Any) -> None:
    steer = add_steer()
    found = by_name(compare(model, {"it": steer}, served(model, steer)))
    assert [found[name].state for name in ("unsteered", "it")] == ["ok", "ok"]
    assert found["it"].figures["difference"] < 1e-4
    assert found["it"].figures["agreement"] == 1
    assert found["it"].figures["effect"] > 0.1


def test_a_wrong_reference_is_reported_as_failed(model: Any) -> None:
    found = by_name(compare(model, {"it": add_steer(2)}, served(model, add_steer(1))))
    assert found["unsteered"].state == "ok"
    assert found["it"].state == "FAILED" and "not steered" not in found["it"].said
    assert failed(list(found.values()))


def test_an_engine_that_does_not_steer_is_reported_as_such(model: Any) -> None:
    answers = served(model, add_steer())
    plain = [replace(a, setting={"it": 1.0}) for a in answers.batches["unsteered"]]
    answers.batches["large"] = plain
    found = by_name(compare(model, {"it": add_steer()}, answers))
    assert found["it"].state == "FAILED"
    assert found["it"].said.startswith("not steered: these are the answers of the unsteered model")


def test_a_steer_too_weak_to_tell_is_not_tested(model: Any) -> None:
    weak = add_steer(size=1e-4)
    found = by_name(compare(model, {"it": weak}, served(model, weak)))
    assert found["it"].state == "not tested" and "too little to tell" in found["it"].said


def test_a_token_that_is_not_the_references_choice_fails_though_its_logprob_is_right(
    model: Any,
) -> None:
    answers = served(model, add_steer())
    first = answers.batches["unsteered"][0]
    with torch.no_grad():
        logits = model(torch.tensor([first.prompt])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    wrong = replace(first, tokens=[second], logprobs=[float(logits.log_softmax(-1)[second])])
    answers.batches["unsteered"] = [wrong]
    assert by_name(compare(model, {}, answers))["unsteered"].state == "FAILED"


def test_a_narrow_dtype_is_judged_by_how_far_the_unsteered_model_is_off(model: Any) -> None:
    def off(answers: Served, batch: str, by: float) -> None:
        answers.batches[batch] = [
            replace(a, logprobs=[value - by for value in a.logprobs])
            for a in answers.batches[batch]
        ]

    def judged(unsteered: float, large: float) -> list[str]:
        answers = replace(served(model, add_steer(size=3)), dtype="bfloat16")
        off(answers, "unsteered", unsteered)
        off(answers, "large", large)
        return [f.state for f in compare(model, {"it": add_steer(size=3)}, answers)]

    assert judged(0.0, 0.04) == ["ok", "ok"]
    assert judged(0.0, 0.06) == ["ok", "FAILED"]
    assert judged(0.1, 0.35) == ["ok", "ok"]
    assert judged(0.4, 0.6) == ["ok", "FAILED"]
    assert judged(0.6, 0.0) == ["FAILED", "ok"]


def test_zero_steers_must_keep_every_bit(model: Any) -> None:
    answers = served(model, add_steer())
    assert zero_steers(answers).state == "ok"
    first, second = answers.batches["zero"]
    bit = [torch.nextafter(torch.tensor(x), torch.tensor(0.0)).item() for x in first.logprobs]
    answers.batches["zero"] = [replace(first, logprobs=bit), second]
    assert zero_steers(answers).state == "FAILED"
    assert zero_steers(Served()).state == "not tested"


def test_steers_that_the_engine_did_not_come_to_are_not_tested(model: Any) -> None:
    answers = served(model, add_steer())
    del answers.batches["large"]
    found = by_name(compare(model, {"it": add_steer()}, answers))
    assert (found["unsteered"].state, found["it"].state) == ("ok", "not tested")


@pytest.mark.parametrize(
    "ids", [None, [], [3], [3, 500]], ids=["no tokenizer", "empty", "one", "not its own"]
)
def test_a_model_without_a_tokenizer_of_its_own_is_given_random_tokens(
    ids: list[int] | None, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    tokenizer = None if ids is None else lambda _text: {"input_ids": ids}
    given = prompts(read_architecture(str(tmp_path)), tokenizer)
    assert [len(row) for row in given] == [8] * 4
    assert all(0 <= token < 500 for row in given for token in row)
    assert len({tuple(row) for row in given}) == 4


# The engine's process, played by a script.

JOB = Job("model", {}, {}, [[1]], {"unsteered": [{}]}, 1)
ANSWERED = '{"dtype": "float32", "runner": "V1", "device": "cpu", "batches": {"unsteered": []}}'


def python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")  # called as: python -m MODULE JOB ANSWERS
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "^the engine was ended by SIGKILL; the memory may not have sufficed$"),
        ("kill -11 $$", "^the engine was ended by SIGSEGV$"),
        (
            "echo 'Traceback'; echo 'vllm_steer.errors.SteerError: first'; echo 'ValueError: last';"
            "echo 'bye'; exit 1",
            "^the engine broke off: ValueError: last$",
        ),
        (
            "echo '(Engine pid=7) ERROR 01-01 00:00:00 [core.py:1] RuntimeError: inner'; exit 1",
            "^the engine broke off: RuntimeError: inner$",
        ),
        (
            "echo 'pydantic.ValidationError: 1 error'; echo '  Value is 3 [type=x]'; echo; exit 1",
            r"^the engine broke off: pydantic.ValidationError: 1 error Value is 3 \[type=x\]$",
        ),
        ("echo 'a b'; exit 3", "^the engine ended with exit code 3; it said: a b$"),
        ("exit 0", "^$"),
    ],
)
def test_why_an_engine_ended(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, script, monkeypatch)
    found, problem = run_engine(JOB, tmp_path)
    assert found == Served()
    assert re.search(said, problem)


def test_what_a_killed_engine_has_answered_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, f"echo '{ANSWERED}' > $4; kill -9 $$", monkeypatch)
    found, problem = run_engine(JOB, tmp_path)
    assert (found.runner, found.batches) == ("V1", {"unsteered": []})
    assert "SIGKILL" in problem


def test_a_killed_engine_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(tmp_path, "kill -9 $$", monkeypatch)
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    findings = list(examine(read_architecture("embedded")))
    found = by_name(findings)
    assert failed(findings)
    assert found["engine"].state == "FAILED" and "SIGKILL" in found["engine"].said
    assert found["resid-add"].state == found["heads-delta"].state == "not tested"
    assert found["one vector in all layers"].figures["bytes"] == 4 * 128 * 4


# Memory.


def many_steers() -> dict[str, Any]:
    torch.manual_seed(0)
    multiply = {"variant": "multiply", "epsilon": 0.1, "hidden_size": 128}
    pair = torch.randn(2, 128, 5)
    wide = torch.randn(1, 128, 70)
    return {
        "low": LMSteer(**multiply, projector1=pair, projector2=pair, fixed_columns=(1,)),
        "dense": LMSteer(**multiply, projector1=wide, projector2=wide),
        "add": add_steer(),
        "tilt": LMSteer(
            variant="offset",
            offset=torch.randn(2, 1536),
            epsilon=1,
            hidden_size=128,
            fixed_columns=(0,),
        ),
        "push": VectorSteer(vectors=torch.randn(4, 128), layers=(0, 1, 2, 3)),
        "turn": VectorSteer(vectors=torch.randn(2, 128), layers=(1, 3), mode="rotate"),
        "lean": VectorSteer(vectors=torch.randn(1, 128), layers=(2,), site="attn_in"),
        "steps": DeltaSteer(delta=torch.randn(6, 3, 128), layers=(0, 1, 3)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_tensors_in_real_banks(dtype: torch.dtype) -> None:
    steers = many_steers()
    found = takes(steers, hidden_size=128, dtype=dtype)
    heads = {name: s for name, s in steers.items() if isinstance(s, LMSteer)}
    head = fill_head_bank(heads, dtype=dtype, device=torch.device("cpu"))
    tables = [shelf.tables for shelf in (head.hidden, head.logits)]
    parts = [
        t for table in tables for t in (table.shrink, table.expand, table.dense, table.vectors)
    ]
    assert found.sites["head"] == sum(t.untyped_storage().nbytes() for t in parts)
    assert found.sites["head"] == sum(found.steers[name] for name in heads)
    inside = {name: s for name, s in steers.items() if name not in heads}
    layers = fill_layer_bank(
        inside, layers=range(4), device=torch.device("cpu"), project=lambda _, rows: rows
    )
    for shelf in layers.shelves:
        stored = [t for t in (shelf.directions.vectors, shelf.directions.turns) if t is not None]
        assert found.sites[shelf.site] == sum(t.untyped_storage().nbytes() for t in stored)
    assert found.total == sum(found.sites.values())


def test_memory_of_each_steer_by_hand() -> None:
    found = takes(many_steers(), hidden_size=128, dtype=torch.bfloat16).steers
    assert found["low"] == 2 * (2 * 5) * 128 * 2
    assert found["dense"] == 128 * 128 * 2  # fewer bytes than 2 * 70 * 128
    assert found["add"] == 128 * 2
    assert found["tilt"] == 2 * 1536 * 2
    assert found["steps"] == 6 * 3 * 128 * 4  # float32 in every model
    # At resid a steer rotates: there each direction also has a number that says whether it does.
    assert found["push"] == found["turn"] == 4 * 128 * 4 + 4


def test_a_config_that_fits_and_one_steer_that_does_not(tmp_path: Path) -> None:
    wide = VectorSteer(vectors=torch.ones(1, 64), layers=(0,))
    deep = VectorSteer(vectors=torch.ones(2, 128), layers=(0, 9))
    for name, steer in {"good": add_steer(), "wide": wide, "deep": deep}.items():
        save_steer(steer, tmp_path / f"{name}.safetensors")
    entries = "".join(f"  {n}: {{path: {n}.safetensors}}\n" for n in ("good", "wide", "deep"))
    (tmp_path / "steers.yaml").write_text(f"steers:\n{entries}limits: {{max_steers: 7}}\n")
    architecture = read_architecture("embedded")
    found = by_name(config_memory(architecture, tmp_path / "steers.yaml", torch.float32))
    assert found["good"].figures == {"bytes": 128 * 4}
    assert found["wide"].state == found["deep"].state == "FAILED"
    assert "is 64 wide; the site resid of this model is 128" in found["wide"].said
    assert "layer 9 does not exist" in found["deep"].said
    assert found["all steers"].figures["bytes"] == 128 * 4
    assert found["limits"].said.startswith("max_steers 7, max_rank 1024, ")


def test_a_config_that_is_wrong_is_an_error() -> None:
    architecture = read_architecture("embedded")
    with pytest.raises(SteerError, match=r"gone.yaml: no such file"):
        list(config_memory(architecture, "gone.yaml", torch.float32))


def test_examples_are_of_the_models_sizes() -> None:
    found = by_name(example_memory(read_architecture("embedded"), torch.float16))
    sizes = [finding.figures["bytes"] for finding in found.values()]
    assert sizes == [128 * 128 * 2, 4 * 128 * 4, 32 * 4 * 128 * 4]


def test_the_table_shows_brackets_as_they_are() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table("m", [Finding("parity", "engine", "FAILED", "shape [/red] [2]")]))
    assert "shape [/red] [2]" in console.export_text()


def test_a_device_without_memory_for_the_reference_leaves_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr("vllm_steer.doctor.parity.load_model", full)
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    found = by_name(examine(read_architecture("embedded")))
    assert found["Hugging Face"].state == "not tested"
    assert "9 GiB" in found["Hugging Face"].said and "one delta of 32 steps" in found
