"""What vLLM needs to serve a model with a vision tower: torchvision, processors, images."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Media
from wrapped_models import IMAGE, IMAGE_END, IMAGE_START, word_tokenizer

SHIM = Path(__file__).with_name("torchvision_on_cpu")
FOLDER = Path(os.environ.get("VLLM_STEER_TEST_TORCHVISION", Path(sys.prefix) / "torchvision"))
PATCH = {"Qwen3VLForConditionalGeneration": 16}

# What stands for an image in a prompt, before a model's processor puts its placeholders there.
IMAGE_MARKS = {
    "Mistral3ForConditionalGeneration": [IMAGE],
    "Qwen2_5_VLForConditionalGeneration": [IMAGE_START, IMAGE, IMAGE_END],
    "Qwen3VLForConditionalGeneration": [IMAGE_START, IMAGE, IMAGE_END],
}
_MODEL_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")


def vision_environment() -> Mapping[str, str]:
    """The environment of a process that imports torchvision; skips the test without one."""
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    if not FOLDER.is_dir():
        pytest.skip(f"torchvision is not in {FOLDER}: scripts/make_environment.py installs it")
    inherited = [path] if (path := os.environ.get("PYTHONPATH")) else []
    return {"PYTHONPATH": os.pathsep.join([str(SHIM), str(FOLDER), *inherited])}


def random_image(seed: int, *, width: int = 84, height: int = 56) -> Any:
    """An image of random pixels."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor(name: str) -> Any:
    """The processor of a tiny model: up to 64 pixels on a side."""
    import transformers

    tokenizer, patch = word_tokenizer(), PATCH.get(name, 14)
    if name == "Mistral3ForConditionalGeneration":
        return transformers.PixtralProcessor(
            image_processor=transformers.PixtralImageProcessor(
                size={"longest_edge": 56}, patch_size=2 * patch
            ),
            tokenizer=tokenizer,
            patch_size=patch,
            spatial_merge_size=2,
            image_token="<image>",
            image_break_token="<image_break>",
            image_end_token="<image_end>",
        )
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    images = transformers.Qwen2VLImageProcessor(
        size=pixels, patch_size=patch, merge_size=2, temporal_patch_size=2
    )
    if name == "Qwen3VLForConditionalGeneration":
        videos = transformers.Qwen3VLVideoProcessor()
        return transformers.Qwen3VLProcessor(images, tokenizer, videos)
    videos = transformers.Qwen2VLVideoProcessor()
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, videos)


def media(name: str, image: Any) -> Media:
    """What a Hugging Face model is given beside the token ids of a prompt with an image."""
    words = {IMAGE: "<image>", IMAGE_START: "<image_start>", IMAGE_END: "<image_end>"}
    text = " ".join(words[token] for token in IMAGE_MARKS[name])
    encoded = processor(name)(text=text, images=[image], return_tensors="pt")
    inputs = {key: encoded[key] for key in _MODEL_INPUTS if key in encoded}
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.float64)
    return Media(inputs, IMAGE, "mm_token_type_ids" if "Qwen" in name else None)
