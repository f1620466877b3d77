"""Reads vectors of the steering-vectors library: ``torch.save`` of its dataclass or its fields.

``layer_activations`` maps layers to ``[d]``; the vector is added to the output of the module
``layer_type``. Layers are the modules of that type in the order of the model, counted from 0
(``layer_matching.py``, ``collect_matching_layers``); ``steering_vector.py`` adds in a forward hook
of the module itself, so layer ``L`` of ``decoder_block`` is block ``L``'s output.

| layer_type        | site       |
|-------------------|------------|
| `decoder_block`   | `resid`    |
| `self_attn`       | `attn_out` |
| `input_layernorm` | `attn_in`  |

``mlp`` and ``post_attention_layernorm`` have no site here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_vector
from vllm_steer.files.layer_vectors import stack_directions
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.untrusted_text import listed, shown

NAME = "a vector of the steering-vectors library"
_FIELDS = {"layer_activations", "layer_type"}
_SITES: dict[str, Any] = {
    "decoder_block": "resid",
    "self_attn": "attn_out",
    "input_layernorm": "attn_in",
}


class _SteeringVector:
    """Placeholder for the library's class; a pickle can only set its attributes."""


CLASSES: dict[str, type] = {"steering_vectors.steering_vector.SteeringVector": _SteeringVector}


def is_steering_vector(loaded: Any) -> bool:
    """True for the library's dataclass, or a dict of its fields."""
    return isinstance(loaded, _SteeringVector) or (
        isinstance(loaded, dict) and "layer_activations" in loaded
    )


def read(loaded: Any, overrides: SteerMetadata) -> VectorSteer:
    """A steer that is added at the layer type's site; ``SteerError`` for other fields."""
    fields = loaded if isinstance(loaded, dict) else vars(loaded)
    unknown = set(fields) - _FIELDS
    activations = fields.get("layer_activations")
    if unknown or not isinstance(activations, Mapping):
        raise SteerError(
            f"it has {listed(fields, none='no fields')}; expected layer_activations, "
            "a dict of tensors by layer, and layer_type"
        )
    vectors, layers = stack_directions({n: _flat(v) for n, v in activations.items()})
    layer_type = fields.get("layer_type", "decoder_block")
    if not isinstance(layer_type, str) or layer_type not in _SITES:
        raise SteerError(
            f"layer_type is {shown(layer_type)}; allowed: {', '.join(_SITES)}; other layer "
            "types have no site"
        )
    return build_vector(
        vectors, layers, overrides.completed_by(SteerMetadata(site=_SITES[layer_type]))
    )


def _flat(vector: Any) -> Any:
    """Flatten ``[1, d]`` and ``[1, 1, d]`` as the library does."""
    if isinstance(vector, torch.Tensor) and vector.ndim and vector.numel() == vector.shape[-1]:
        return vector.reshape(-1)
    return vector
