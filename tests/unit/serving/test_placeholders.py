"""Which tokens of a prompt are placeholders, from vLLM's own description of its items."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_steer.doses import PHASES, Dose
from vllm_steer.serving.placeholders import placeholder_bounds

TEXT = [Dose("a", 1.0, phase="text")]
LENGTH = 24


def feature(
    offset: int, length: int, is_embed: list[bool] | None = None, modality: str = "image"
) -> MultiModalFeatureSpec:
    mask = None if is_embed is None else torch.tensor(is_embed, dtype=torch.bool)
    return MultiModalFeatureSpec(None, modality, "hash", PlaceholderRange(offset, length, mask))


@st.composite
def features(draw: Any) -> MultiModalFeatureSpec:
    offset = draw(st.integers(0, LENGTH - 1))
    length = draw(st.integers(1, LENGTH - offset))
    masks = st.lists(st.booleans(), min_size=length, max_size=length)
    modality = draw(st.sampled_from(["image", "audio", "video", "prompt_embeds"]))
    return feature(offset, length, draw(st.none() | masks), modality)


@given(st.lists(features(), max_size=4))
def test_the_bounds_enclose_what_embeddings_replace_and_nothing_else(items: list[Any]) -> None:
    """Items may overlap: the sound of a video."""
    bounds = placeholder_bounds(TEXT, items, LENGTH)
    assert list(bounds) == sorted(set(bounds)) and len(bounds) % 2 == 0
    ranges = list(zip(bounds[::2], bounds[1::2], strict=True))
    for token in range(LENGTH):
        expected = any(
            item.mm_position.offset <= token < item.mm_position.offset + item.mm_position.length
            and (
                item.mm_position.is_embed is None
                or bool(item.mm_position.is_embed[token - item.mm_position.offset])
            )
            for item in items
            if item.modality != "prompt_embeds"
        )
        assert expected == any(begin <= token < end for begin, end in ranges)


def test_without_a_dose_of_text_nothing_is_read() -> None:
    others = [Dose("a", 1.0, phase=phase) for phase in PHASES if phase != "text"]
    assert placeholder_bounds(others, [object()], 8) == ()


def test_a_prompt_of_text_has_no_placeholders() -> None:
    assert placeholder_bounds(TEXT, None, 8) == placeholder_bounds(TEXT, [], 8) == ()


def test_the_start_and_the_end_of_an_image_are_text() -> None:
    mask = [False, True, True, False, True, True, False]
    assert placeholder_bounds(TEXT, [feature(3, 7, mask)], 12) == (4, 6, 7, 9)
