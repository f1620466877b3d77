"""Vectors of the steering-vectors library: ``torch.save`` of its dataclass, or of its fields.

``layer_activations`` maps layers to ``[d]``, ``layer_type`` names the module whose output the
vector is added to. Layers are the modules of that type in the order of the model, counted from 0
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
from vllm_steer.files.directions import stack_directions
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_vector
from vllm_steer.foreign import listed, shown
from vllm_steer.steers import VectorSteer

NAME = "a vector of the steering-vectors library"
_FIELDS = {"layer_activations", "layer_type"}
_SITES: dict[str, Any] = {
    "decoder_block": "resid",
    "self_attn": "attn_out",
    "input_layernorm": "attn_in",
}


class _SteeringVector:
    """Stands in for the library's class: a pickle may set its attributes, and that is all."""


CLASSES: dict[str, type] = {"steering_vectors.steering_vector.SteeringVector": _SteeringVector}


def fits(loaded: Any) -> bool:
    """Whether what was saved is the library's dataclass, or a dict of its fields."""
    return isinstance(loaded, _SteeringVector) or (
        isinstance(loaded, dict) and "layer_activations" in loaded
    )


def read(loaded: Any, facts: Facts) -> VectorSteer:
    """Add at the site of the layer type. Raises ``SteerError`` for fields of other shapes."""
    said = loaded if isinstance(loaded, dict) else vars(loaded)
    unknown = set(said) - _FIELDS
    activations = said.get("layer_activations")
    if unknown or not isinstance(activations, Mapping):
        raise SteerError(
            f"it holds {listed(said, none='nothing')}; expected layer_activations, "
            "a dict of tensors by layer, and layer_type"
        )
    vectors, layers = stack_directions({n: _flat(v) for n, v in activations.items()})
    layer_type = said.get("layer_type", "decoder_block")
    if not isinstance(layer_type, str) or layer_type not in _SITES:
        raise SteerError(
            f"layer_type is {shown(layer_type)}; allowed: {', '.join(_SITES)}: the others "
            "have no site"
        )
    return make_vector(vectors, layers, facts.over(Facts(site=_SITES[layer_type])))


def _flat(vector: Any) -> Any:
    """The library flattens what it adds: ``[1, d]`` and ``[1, 1, d]`` are vectors too."""
    if isinstance(vector, torch.Tensor) and vector.ndim and vector.numel() == vector.shape[-1]:
        return vector.reshape(-1)
    return vector
