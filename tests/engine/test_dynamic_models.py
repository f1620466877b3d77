"""Dynamic strengths on other models, and of every kind of steer at every site."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import stories
import torch
import transformers
from dynamic_outputs import assert_dynamic
from dynamic_settings import SETTINGS
from engines import (
    RUNNER,
    Setting,
    doses_of,
    dynamic,
    engine,
    greedy,
    guidance_steers,
    guided_family,
    prompts,
    random_steers,
    reporting,
    steer_config,
)
from outside import STORIES, needs
from reference import load_reference
from test_sharing import merge_adapter, save_adapter
from tiny_models import GUIDED_LAYERS, HIDDEN, save_tiny_model

from vllm_steer import Steer
from vllm_steer.fit import fit_delta

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


def assert_batch(
    model: Path,
    steers: Mapping[str, Steer],
    folder: Path,
    settings: Sequence[Setting] = SETTINGS,
    **options: Any,
) -> list[Any]:
    """Serve one batch and compare it; the engine's other options are its own."""
    reference = load_reference(model)
    with engine(model, steer_config(steers, folder), max_num_seqs=128, **options) as llm:
        outputs = llm.generate(prompts(len(settings)), reporting(greedy(settings)), use_tqdm=False)
    for output, setting in zip(outputs, settings, strict=True):
        assert_dynamic(output, reference, doses_of(setting, steers), steers)
    return outputs


# The others are variations of these; see test_guidance.py.
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(family, marks=pytest.mark.matrix)
            for family in ("gpt2", "gemma2", "mixtral", "qwen3-heads-wider-than-hidden")
        ),
    ],
)
def test_every_kind_site_and_mode_on_each_family(family: str, tmp_path: Path) -> None:
    steers = guided_family(family)[1]
    model = save_tiny_model(family, tmp_path / "model", num_layers=GUIDED_LAYERS)
    outputs = assert_batch(model, steers, tmp_path / "steers")
    all_strengths = [
        strength
        for output in outputs
        for strengths in output.outputs[0].steer_strengths.values()
        for strength in strengths
    ]
    assert len(set(all_strengths)) > len(all_strengths) // 4


@pytest.mark.matrix
def test_all_streams_of_a_request_use_its_lora_adapter(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model = save_tiny_model("llama", tmp_path / "model")
    steers = guidance_steers(HIDDEN, 2, HIDDEN)
    adapter = save_adapter(tmp_path / "adapter")
    plain, merged = load_reference(model), merge_adapter(load_reference(model), adapter)
    pairs = [{"steps": dynamic(top_p=0.8)}, {"push": dynamic(1.0, top_p=0.9), "turn": dynamic(4.0)}]
    settings = [setting for setting in pairs for _ in range(2)]
    lora = LoRARequest("adapter", 1, str(adapter))
    requests = [lora, None] * 2
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with engine(model, steer_config(steers, tmp_path / "steers"), **options) as llm:
        outputs = llm.generate(
            prompts(4), reporting(greedy(settings)), lora_request=requests, use_tqdm=False
        )
    for output, setting, request in zip(outputs, settings, requests, strict=True):
        assert_dynamic(output, merged if request else plain, doses_of(setting, steers), steers)


@v1_only
@pytest.mark.matrix
def test_compiled_model(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", num_layers=GUIDED_LAYERS)
    steers = guided_family("llama")[1]
    assert_batch(model, steers, tmp_path / "steers", enforce_eager=False)


@pytest.mark.matrix
@needs(STORIES)
def test_deltas_fitted_to_happy_and_sad_stories_on_a_pretrained_model(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    happy, sad = (stories.stories(side, 12, seed=1) for side in stories.SIDES)
    steers: dict[str, Steer] = {
        "happy": fit_delta(model, tokenizer, happy, sad, steps=12),
        "sad": fit_delta(model, tokenizer, sad, happy, steps=16, site="resid"),
        **random_steers(64, 512),
    }
    settings: list[Setting] = [
        {"happy": dynamic()},
        {"sad": dynamic(0.4, top_p=0.8)},
        {"happy": dynamic(3.0, top_p=0.9), "plain": dynamic(3.0, top_p=0.9)},
        {"happy": dynamic(), "sad": dynamic(-0.4), "tilt": dynamic(2.0, top_p=0.9)},
        {"sad": dynamic(kl="authors"), "bias": 2.0},
        {"dummy": dynamic(2.0, top_p=0.9)},
    ]
    prompts = [{"prompt_token_ids": ids} for ids in tokenizer(stories.prompts()).input_ids]
    reference = load_reference(STORIES)
    with engine(STORIES, steer_config(steers, tmp_path)) as llm:
        together = llm.generate(prompts, reporting(greedy(settings, max_tokens=24)), use_tqdm=False)
        alone = [
            llm.generate(prompt, reporting(greedy([setting], max_tokens=24)), use_tqdm=False)[0]
            for prompt, setting in zip(prompts, settings, strict=True)
        ]
    for outputs in (together, alone):
        for output, setting in zip(outputs, settings, strict=True):
            assert_dynamic(output, reference, doses_of(setting, steers), steers)
