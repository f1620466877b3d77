"""Steered requests with shared prefixes, adapters, defaults and presets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import doses_of, engine, greedy, guidance_steers, prompts, steer_config
from reference import assert_greedy, assert_guided, load_reference
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN

from vllm_steer import SteerError

pytestmark = pytest.mark.engine


def test_prefix_stays_shared_between_steered_and_unsteered_requests(
    llama: Path, steers: dict[str, Any], tmp_path: Path
) -> None:
    settings = [{}, {"plain": 3.0}, {"bias": 4.0, "tilt": 2.0}, {}, {"dummy": -2.0}]
    prompt = prompts(1, length=100)
    reference = load_reference(llama)
    with engine(llama, steer_config(steers, tmp_path), block_size=32) as llm:
        outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for params in greedy(settings)]
    assert [output.num_cached_tokens for output in outputs] == [0, 96, 96, 96, 96]
    for output, setting in zip(outputs, settings, strict=True):
        assert_greedy(output, reference, setting, steers)


def test_requests_with_and_without_a_lora_adapter_are_steered_alike(
    llama: Path, steers: dict[str, Any], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    adapter = save_adapter(tmp_path / "adapter")
    plain, merged = load_reference(llama), merge_adapter(load_reference(llama), adapter)
    steers = {**steers, **guidance_steers(HIDDEN, 2, HIDDEN)}
    pairs: list[Any] = [{}, {"plain": 3.0}, {"tilt": -3.0}, {"push": 2.0}, {"turn": 4.0}]
    pairs += [{"steps": 3.0}, {"spin": 5.0, "bias": 4.0}]
    settings = [setting for setting in pairs for _ in range(2)]
    lora = LoRARequest("adapter", 1, str(adapter))
    requests = [lora if index % 2 else None for index in range(len(settings))]
    config = steer_config(steers, tmp_path / "steers")
    # Two slots for one adapter: with all slots taken, vLLM on a CPU gives the last adapter to
    # requests that have none.
    with engine(llama, config, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        outputs = llm.generate(
            prompts(len(settings)), greedy(settings), lora_request=requests, use_tqdm=False
        )
    for output, setting, request in zip(outputs, settings, requests, strict=True):
        model = merged if request else plain
        assert_guided(output, model, doses_of(setting, steers), steers)


def test_reloaded_weights_are_steered_like_loaded_ones(llama: Path, tmp_path: Path) -> None:
    """Directions at ``heads`` go through the attention's projection, whose weights change."""
    steers = guidance_steers(HIDDEN, 2, HIDDEN)
    before, after = load_reference(llama), load_reference(llama)
    with torch.no_grad():
        for layer in after.model.layers:
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight.flip(0))
    settings: tuple[Any, ...] = ({"steps": 3.0}, {"push": 1.0, "steps": -2.0}, {})
    after.float().save_pretrained(tmp_path / "after")
    after = load_reference(tmp_path / "after")
    with engine(llama, steer_config(steers, tmp_path / "steers")) as llm:
        for model in (before, after):
            if model is after:
                path = str(tmp_path / "after")
                llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
                llm.reset_prefix_cache()
            outputs = llm.generate(prompts(len(settings)), greedy(settings), use_tqdm=False)
            for output, setting in zip(outputs, settings, strict=True):
                assert_guided(output, model, doses_of(setting, steers), steers)


def test_the_default_steers_requests_without_a_steer_and_none_overrides_it(
    llama: Path, steers: dict[str, Any], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    config = steer_config(steers, tmp_path) | {"presets": {"mix": {"plain": 2, "bias": 1}}}
    request_values = [
        None,
        "none",
        "",
        {},
        "mix:0.5",
        {"mix": 0.5},
        "plain:1,plain:1",
        '{"plain": 2}',
    ]
    full, half, plain = {"plain": 2.0, "bias": 1.0}, {"plain": 1.0, "bias": 0.5}, {"plain": 2.0}
    expected: list[dict[str, float]] = [full, {}, {}, {}, half, half, plain, plain]
    params = greedy([{}] * len(request_values))
    for param, ask in zip(params, request_values, strict=True):
        param.extra_args = None if ask is None else {"steer": ask}
    before = [json.dumps(param.extra_args) for param in params]
    reference = load_reference(llama)
    with engine(llama, config | {"default": "mix"}) as llm:
        outputs = llm.generate(prompts(len(request_values)), params, use_tqdm=False)
        with pytest.raises(SteerError, match=r"'nobody' is unknown; steers: bias, dummy"):
            llm.generate(prompts(1), SamplingParams(extra_args={"steer": "nobody"}))
        again = llm.generate(prompts(1), params[:1], use_tqdm=False)
    assert [json.dumps(param.extra_args) for param in params] == before
    assert again[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    for output, setting in zip(outputs, expected, strict=True):
        assert_greedy(output, reference, setting, steers)


def save_adapter(folder: Path, rank: int = 4) -> Path:
    """A random LoRA adapter of q_proj and v_proj in PEFT's layout."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(HIDDEN, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(model: Any, adapter: Path, scaling: float = 2.0) -> Any:
    """The reference with ``scaling * B A`` added to each adapted weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = model.get_submodule(path).weight
            weight.data += scaling * (b.double() @ a.double())
    return model
