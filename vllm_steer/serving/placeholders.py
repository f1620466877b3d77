"""The tokens of a prompt that stand for images, audio or video."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vllm_steer.doses import Dose

# A user's own embeddings of text: vLLM carries them like a modality.
_TEXT_EMBEDDINGS = "prompt_embeds"


def placeholder_bounds(
    doses: Iterable[Dose], mm_features: Sequence[Any] | None, prompt_len: int
) -> tuple[int, ...]:
    """``(begin, end, begin, end, ...)`` of the placeholder ranges ``[begin, end)``, ascending and
    apart from each other; empty if no dose has the phase ``text``.

    A token is a placeholder if an embedding of an image, audio or video takes its place. Tokens
    around them that vLLM counts to the item, such as the start and the end of an image, are text.
    """
    if not mm_features or not any(dose.phase == "text" for dose in doses):
        return ()
    is_placeholder = np.zeros(prompt_len + 2, dtype=np.int8)  # a token of text at both ends
    for feature in mm_features:
        if feature.modality == _TEXT_EMBEDDINGS:
            continue
        position = feature.mm_position
        begin = position.offset + 1
        span = is_placeholder[begin : begin + position.length]
        embeds = position.is_embed
        span |= 1 if embeds is None else embeds.numpy().astype(np.int8)[: len(span)]
    return tuple(map(int, np.flatnonzero(np.diff(is_placeholder))))
