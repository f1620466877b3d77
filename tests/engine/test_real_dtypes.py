"""Steers in bfloat16 and float16, against Hugging Face in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import (
    GUIDED,
    engine,
    greedy,
    guidance_steers,
    prompts,
    steer_config,
)
from reference import assert_as_near_as_unsteered, load_reference
from safetensors.torch import load_file, save_file
from tiny_models import BLOCK, GUIDED_LAYERS, HIDDEN, save_random, save_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.matrix]
SETTINGS = tuple(s for s in GUIDED if not {"plain", "bias", "tilt"} & set(s))
UNSTEERED: tuple[Mapping[str, Any], ...] = ({},) * 24


def round_weights(model: Path, dtype: str) -> None:
    """Make the weights those that the engine computes with."""
    path = model / "model.safetensors"
    weights = load_file(path)
    rounded = {name: weight.to(getattr(torch, dtype)).float() for name, weight in weights.items()}
    save_file(rounded, path, {"format": "pt"})


def assert_steered(
    model: Path, dtype: str, settings: Any, steers: Any, folder: Path, **limits: float
) -> None:
    round_weights(model, dtype)
    every = [*settings, *UNSTEERED]
    with engine(model, steer_config(steers, folder), dtype=dtype) as llm:
        outputs = llm.generate(prompts(len(every)), greedy(every, max_tokens=12), use_tqdm=False)
    assert_as_near_as_unsteered(outputs, load_reference(model), every, steers, **limits)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("llama", "bfloat16"), ("gpt2", "bfloat16"), ("gemma2", "bfloat16")),
        *(("llama", "float16"), ("gpt2", "float16")),
    ],
)
def test_a_steered_model_is_as_near_to_float64_as_an_unsteered_one(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model", num_layers=GUIDED_LAYERS)
    steers = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    assert_steered(model, dtype, SETTINGS, steers, tmp_path / "steers")


def test_a_residual_stream_500_times_as_large_as_the_vector(tmp_path: Path) -> None:
    """In bfloat16 such a stream keeps little of the vector, steered or not."""
    config = transformers.LlamaConfig(
        **BLOCK, head_dim=32, num_hidden_layers=GUIDED_LAYERS, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = save_random(transformers.LlamaForCausalLM(config), tmp_path / "model", embedding=250.0)
    steers = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    settings = ({"lean": -1.5}, {"turn": 6.0}, {"spin": 500.0}, {"push": 2.0}, {"nudge": 500.0})
    assert_steered(model, "bfloat16", settings, steers, tmp_path / "steers", clear_share=0.3)
