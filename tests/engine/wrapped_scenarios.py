"""Scenarios of ``own_process.py`` on tiny models around a language model.

They run in a process of their own, where torchvision may be importable: ``vision_environment``.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from engines import (
    GUIDED,
    Setting,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    prompts,
    random_steers,
    steer_config,
)
from reference import assert_guided, load_reference
from vision import IMAGE_MARKS, media, processor, random_image
from wrapped_models import HIDDEN, LAYERS, VOCAB, save_wrapped

STEERS = {**random_steers(HIDDEN, VOCAB), **guidance_steers(HIDDEN, LAYERS, HIDDEN)}
BLOCK = 32

# Each with two images in turn, then with the first again. The first ones change the keys and values
# of the prompt, the others share the unsteered prompt's blocks.
OWN_BLOCKS: tuple[Setting, ...] = (
    {},
    {"push": 1.0},
    {"bend": 5.0},
    {"turn": {"strength": -8.0, "phase": "prompt"}},
    {"push": {"strength": 1.0, "phase": "text"}},
    {"spin": {"strength": 4.0, "phase": "text"}, "nudge": 1.0},
)
SHARED_BLOCKS: tuple[Setting, ...] = (
    {"nudge": {"strength": 2.0, "phase": "generation"}},
    {"steps": 3.0, "plain": 2.0},
)
IMAGE_SETTINGS = (*OWN_BLOCKS, *SHARED_BLOCKS)


def wrapped_models(folder: Path) -> None:
    """Text prompts on each model named on the command line, with every setting."""
    for name in sys.argv[2:]:
        model = save_wrapped(name, folder / name)
        reference = load_reference(model)
        config = steer_config(STEERS, folder / f"{name}-steers")
        limits = {"image": 0, "video": 0}
        with engine(model, config, limit_mm_per_prompt=limits, skip_tokenizer_init=False) as llm:
            params = greedy(GUIDED, prompt_logprobs=1)
            outputs = llm.generate(prompts(len(GUIDED)), params, use_tqdm=False)
        for output, setting in zip(outputs, GUIDED, strict=True):
            assert_guided(output, reference, doses_of(setting, STEERS), STEERS)
        assert len({tuple(o.outputs[0].token_ids) for o in outputs}) > len(outputs) // 2
        print(f"{name}: {len(outputs)} outputs equal the reference")


def image_prompts(folder: Path) -> None:
    """The same text with one of two images, cold and from the prefix cache, chunk by chunk."""
    for name in sys.argv[2:]:
        model = save_wrapped(name, folder / name)
        processor(name).save_pretrained(model)
        reference = load_reference(model)
        config = steer_config(STEERS, folder / f"{name}-steers")
        images = [random_image(0), random_image(1)]
        with engine(
            model,
            config,
            limit_mm_per_prompt={"image": 1, "video": 0},
            skip_tokenizer_init=False,
            block_size=BLOCK,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            long_prefill_token_threshold=7,  # a chunk ends inside the image
        ) as llm:
            outputs = [
                _ask(llm, name, images[number], setting)
                for setting in IMAGE_SETTINGS
                for number in (0, 1, 0)
            ]
        media_of_image = [media(name, image) for image in images]
        for index, output in enumerate(outputs):
            setting, number = IMAGE_SETTINGS[index // 3], (0, 1, 0)[index % 3]
            assert_guided(
                output, reference, doses_of(setting, STEERS), STEERS, media=media_of_image[number]
            )
            is_known = setting in SHARED_BLOCKS or index % 3 == 2
            assert output.num_cached_tokens == (BLOCK if is_known else 0)
        for first, second in zip(outputs[::3], outputs[1::3], strict=True):
            assert _logprobs(first) != pytest.approx(_logprobs(second), abs=1e-2)
        print(f"{name}: {len(outputs)} outputs equal the reference")


def _logprobs(output: Any) -> list[float]:
    tokens, steps = output.outputs[0].token_ids, output.outputs[0].logprobs
    return [step[token].logprob for token, step in zip(tokens, steps, strict=True)]


def _ask(llm: Any, name: str, image: Any, setting: Setting) -> Any:
    ids = [7, 9, 30, 31, *IMAGE_MARKS[name], *range(100, 140)]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
    (output,) = llm.generate([prompt], greedy([setting], max_tokens=8), use_tqdm=False)
    return output
