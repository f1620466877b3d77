"""Reads step deltas of Dynamic Activation Composition: one tensor saved by ``torch.save``.

``[steps, layers, heads, d_head]`` for all layers, counted from 0. The delta is added to the input
of the attention's output projection, the concatenated heads. On GPT-2 and GPT-NeoX the authors'
code takes the attention block's input instead: give ``site: attn_in`` there.

Source: Scalena et al., BlackboxNLP 2024 (arXiv 2406.17563), their repository's ``extraction.py``
(files) and ``delta.py`` (use).
"""

import torch

from vllm_steer.files.build import build_delta
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import DeltaSteer
from vllm_steer.steers.checks import check_tensor

NAME = "a delta of Dynamic Activation Composition"
DIMENSIONS = 4


def read(delta: torch.Tensor, overrides: SteerMetadata) -> DeltaSteer:
    """The delta with concatenated heads; ``SteerError`` for an empty or non-finite tensor."""
    check_tensor("delta", delta, dims=DIMENSIONS)
    return build_delta(delta.flatten(2), range(delta.shape[1]), overrides)
