"""The doctor's checks of a model's config and of the environment."""

import io
from pathlib import Path
from typing import Any

import pytest
import transformers
from doctor_tools import SMALL, by_name

from vllm_steer import SteerError
from vllm_steer.cli.terminal import Console
from vllm_steer.doctor import Finding, environment
from vllm_steer.doctor.architecture import describe, read_architecture
from vllm_steer.doctor.environment import environment as look
from vllm_steer.doctor.report import examine, failed, table


def described(config: Any, name: str, folder: Path) -> dict[str, Finding]:
    config.architectures = [name]
    config.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return by_name(describe(read_architecture(str(folder))))


def states(findings: dict[str, Finding]) -> dict[str, str]:
    return {name.removeprefix("site "): f.state for name, f in findings.items() if "site" in name}


ALL = dict.fromkeys(("head", "resid", "attn_in", "attn_out", "heads"), "ok")


def test_a_model_with_every_site_is_described_from_its_config(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**{**SMALL, "num_attention_heads": 4}, head_dim=32)
    findings = described(config, "Qwen3ForCausalLM", tmp_path)
    assert states(findings) == ALL
    assert findings["sizes"].figures == {"hidden_size": 64, "layers": 3, "vocab_size": 500}
    assert findings["site resid"].figures["width"] == 64
    assert findings["site heads"].figures["width"] == 4 * 32
    assert not failed(list(findings.values()))


def test_a_model_without_an_input_norm_lacks_one_site_and_that_is_no_failure(
    tmp_path: Path,
) -> None:
    findings = described(transformers.Olmo2Config(**SMALL), "Olmo2ForCausalLM", tmp_path)
    assert states(findings) == {**ALL, "attn_in": "missing"}
    assert (
        "norm before its attention: the site attn_in does not" in findings["site attn_in"].message
    )
    assert not failed(list(findings.values()))


@pytest.mark.parametrize(
    ("config", "name", "state", "reason"),
    [
        (transformers.BloomConfig(**SMALL), "BloomForCausalLM", "not tested", "in a self-test"),
        (
            transformers.LlamaConfig(**SMALL),
            "DeepseekV4ForCausalLM",
            "missing",
            "several streams (hyper-connections)",
        ),
    ],
)
def test_an_unsupported_model_keeps_the_head_and_gives_a_reason_for_the_other_sites(
    config: Any, name: str, state: str, reason: str, tmp_path: Path
) -> None:
    findings = described(config, name, tmp_path)
    assert states(findings) == {**dict.fromkeys(ALL, state), "head": "ok"}
    assert reason in findings["site heads"].message
    assert "LlamaForCausalLM" not in findings["site heads"].message


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
    findings = by_name(look())
    assert (findings["vllm"].state, findings["triton"].state) == ("FAILED", "missing")


@pytest.mark.parametrize(
    ("variables", "state", "message"),
    [
        ({}, "ok", "installed and active, entry point steer"),
        ({"VLLM_STEER_DISABLE": "0"}, "ok", "installed"),
        ({"VLLM_STEER_DISABLE": "1"}, "FAILED", "switched off by VLLM_STEER_DISABLE=1; unset it"),
        ({"VLLM_PLUGINS": "other"}, "FAILED", "VLLM_PLUGINS=other does not include steer; add it"),
        ({"VLLM_PLUGINS": "other,steer"}, "ok", "installed"),
    ],
)
def test_whether_vllm_will_load_the_plugin(
    variables: dict[str, str], state: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_STEER_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = by_name(look())["plugin"]
    assert finding.state == state and message in finding.message


def test_a_plugin_that_is_switched_off_fails_and_starts_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STEER_DISABLE", "1")
    findings = list(examine(read_architecture("embedded")))
    assert failed(findings)
    engine = by_name(findings)["engine"]
    assert engine.state == "not tested" and "VLLM_STEER_DISABLE" in engine.message


def test_the_table_shows_brackets_as_they_are() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table("m", [Finding("parity", "engine", "FAILED", "shape [/red] [2]")]))
    assert "shape [/red] [2]" in console.export_text()


def test_the_keys_of_a_finding_in_json() -> None:
    data = Finding("model", "sizes", "-", "hidden size 64", {"hidden_size": 64}).as_json
    assert list(data) == ["part", "name", "state", "said", "figures"]
    assert data["said"] == "hidden size 64"
