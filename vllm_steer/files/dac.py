"""Deltas of Dynamic Activation Composition: ``torch.save`` of a bare tensor.

``[steps, layers, heads, d_head]``, layers counted from 0 and all there, added to the input of the
attention's output projection, where the heads lie side by side. On GPT-2 and GPT-NeoX the authors'
code takes the attention block's input instead: give ``site: attn_in`` there.

Source: Scalena et al., BlackboxNLP 2024 (arXiv 2406.17563), their repository's ``extraction.py``
(files) and ``delta.py`` (use).
"""

import torch

from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_delta
from vllm_steer.steers import DeltaSteer
from vllm_steer.steers.checks import check_tensor

NAME = "a delta of Dynamic Activation Composition"
DIMENSIONS = 4


def read(delta: torch.Tensor, facts: Facts) -> DeltaSteer:
    """The delta with its heads side by side. Raises ``SteerError`` for one without values."""
    check_tensor("delta", delta, dims=DIMENSIONS)
    return make_delta(delta.flatten(2), range(delta.shape[1]), facts)
